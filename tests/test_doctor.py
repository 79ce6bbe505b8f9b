"""`mse-doctor`: it survives whatever is missing and says how to mend it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mse_runtime import cache, doctor_checks, nvml
from mse_runtime.adapter import auto as adapter_auto
from mse_runtime.bundle.hub import builtin_bundles
from mse_runtime.doctor import examine
from mse_runtime.doctor_checks import Finding, run_checks

# Groups that must be there whatever is missing.
GROUPS = {"machine", "gpu", "libraries", "onnx runtime", "llama.cpp", "bundles", "cache"}


def doctor(
    hidden: Iterable[str] = (), arguments: Iterable[str] = ("--json",), **environment: str
) -> subprocess.CompletedProcess[str]:
    """`mse-doctor` in a child process in which `hidden` modules cannot be imported."""
    code = (
        f"import sys\nfor name in {list(hidden)!r}: sys.modules[name] = None\n"
        f"sys.argv = ['mse-doctor', *{list(arguments)!r}]\n"
        "from mse_runtime.doctor import main\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def report(child: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in child.stderr, child.stderr
    found: dict[str, Any] = json.loads(child.stdout)
    assert found["schema"] == "mse-runtime/doctor/1"
    assert {check["group"] for check in found["checks"]} >= GROUPS
    return found


def checks(found: dict[str, Any], status: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in found["checks"] if check["status"] == status}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """`mse-doctor --json` with nothing hidden."""
    return doctor(MSE_CACHE=str(tmp_path_factory.mktemp("cache")))


def test_everything_here(whole: subprocess.CompletedProcess[str]) -> None:
    child = whole
    found = report(child)
    assert child.returncode == (0 if found["ok"] else 5)
    ok = checks(found, "ok")
    assert {"Python", "CPU", "cores", "numpy", "av", "cache"} <= set(ok)
    assert set(builtin_bundles()) <= set(ok)


@pytest.mark.parametrize(
    ("module", "name", "fix"),
    [
        ("numpy", "numpy", "pip install 'numpy"),
        ("av", "av", "pip install 'av"),
        ("PIL", "pillow", "pip install 'pillow"),
        ("rich", "rich", "pip install 'rich"),
        ("click", "click", "pip install 'click"),
        ("gguf", "gguf", "pip install 'gguf"),
        ("safetensors", "safetensors", "pip install 'safetensors"),
        ("huggingface_hub", "huggingface_hub", "pip install 'huggingface_hub"),
        ("onnxruntime", "onnxruntime", "pip install 'mse-runtime[cpu]'"),
        ("llama_cpp", "llama-cpp-python", "pip install 'llama-cpp-python"),
    ],
)
def test_a_missing_library_is_named_with_its_command(module: str, name: str, fix: str) -> None:
    child = doctor([module])
    found = report(child)
    assert child.returncode == 5
    assert found["ok"] is False
    missing = checks(found, "error")
    assert name in missing
    assert fix in missing[name]["fix"]


def test_optional_libraries_are_not_needed(whole: subprocess.CompletedProcess[str]) -> None:
    without = report(doctor(["matplotlib", "opensmile", "mse_kernels", "jsonschema"]))
    assert set(checks(without, "error")) == set(checks(report(whole), "error"))
    gaps = checks(without, "info")
    for module in ("matplotlib", "opensmile"):
        assert "pip install" in gaps[module]["fix"]
    assert "cannot run" in gaps["kernels-cpu"]["detail"]


def test_everything_missing_at_once() -> None:
    names = ["numpy", "av", "PIL", "rich", "click", "gguf", "safetensors", "huggingface_hub"]
    names += ["onnxruntime", "llama_cpp", "matplotlib", "mse_kernels", "opensmile"]
    child = doctor(names)
    assert child.returncode == 5
    errors = checks(report(child), "error")
    assert all(
        "fix" in check
        for name, check in errors.items()
        if name not in {"check", *builtin_bundles()}
    )
    text = doctor(names, [])
    assert text.returncode == 5
    assert "MISSING" in text.stdout
    assert "mend: pip install" in text.stdout
    assert "Traceback" not in text.stderr


def test_every_error_and_gap_has_a_command() -> None:
    for group in run_checks().values():
        for finding in group:
            if finding.status in ("error", "warning"):
                assert finding.fix, finding


def test_text_output(capsys: pytest.CaptureFixture[str]) -> None:
    code = examine()
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "onnxruntime" in printed.out
    last = printed.out.strip().splitlines()[-1]
    assert last == (
        "Everything that is needed is here."
        if code == 0
        else "Something needed is missing: see the lines that begin with MISSING."
    )


def test_help_and_wrong_usage() -> None:
    shown = doctor(arguments=["--help"])
    assert shown.returncode == 0
    assert re.search(r"0 everything needed is\s+here", shown.stdout)
    wrong = doctor(arguments=["--nonsense"])
    assert wrong.returncode == 2
    assert wrong.stdout == ""


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    child = doctor(MSE_CACHE=str(tmp_path / "cache"))
    found = checks(report(child), "warning")
    assert "MSE_CACHE" in found["cache"]["fix"]


def test_the_cache_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))
    assert [finding.status for finding in doctor_checks.cache_folder()] == ["ok"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_both_onnx_runtime_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "_version", lambda name: "1.31")
    (wheels, *_) = doctor_checks.onnx_runtime()
    assert wheels.status == "error"
    assert wheels.fix is not None
    assert wheels.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


def test_remembered_choices_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "a": {
            "adapter": "13 + 167 columns to 4 x 192",
            "backend": "kernels-cpu",
            "why": "0.1 ms against 0.2 ms",
        },
        "b": {"trying": "kernels-cuda", "pid": 1},
        "c": "nonsense",
    }
    cache.write_json(adapter_auto.FILE, facts)
    found = {
        finding.status: finding for finding in doctor_checks.kernels() if finding.name == "auto"
    }
    cache.write_json(adapter_auto.FILE, {})
    assert found["ok"].detail.startswith("13 + 167 columns")
    assert "kernels-cpu: 0.1 ms against 0.2 ms" in found["ok"].detail
    assert "kernels-cuda" in found["warning"].detail
    assert str(found["warning"].fix).startswith("rm ")


def test_a_damaged_builtin_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "manifest.json").write_text("{}")
    monkeypatch.setattr("mse_runtime.bundle.hub.BUILTIN", tmp_path)
    (finding,) = doctor_checks.bundles()
    assert finding.status == "error"
    assert "schema_version" in finding.detail
    assert finding.fix


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterable[Finding]:
        yield Finding("first", "ok", "kept")
        raise ZeroDivisionError("by design")

    monkeypatch.setitem(doctor_checks.CHECKS, "machine", broken)
    found = run_checks()["machine"]
    assert [finding.name for finding in found] == ["first", "check"]
    assert "ZeroDivisionError: by design" in found[1].detail


def test_no_driver_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIBRARY", "libnot-there.so.1")
    (finding,) = doctor_checks.gpu()
    assert finding.status == "info"
    assert "no NVIDIA driver" in finding.detail


DRIVER = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit_v2(void) { return FAIL; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { strncpy(text, "570.1", n); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) {
    *h = (void *)(0x700000000000 + i); return 0;
}
int nvmlDeviceGetName(void *h, char *text, unsigned n) {
    strncpy(text, h == (void *)0x700000000001 ? "Second" : "First", n); return 0;
}
int nvmlDeviceGetMemoryInfo(void *h, memory *m) {
    m->total = 24ull << 30; m->free = 6ull << 30; m->used = 18ull << 30; return 0;
}
"""


@pytest.mark.parametrize("failure", [0, 9])
def test_a_driver_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int) -> None:
    """A library with the driver's functions, compiled here: the calls and structures fit."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libdriver.so"
    flags = ["-shared", "-fPIC", f"-DFAIL={failure}", "-o", str(library)]
    subprocess.run([compiler, *flags, str(tmp_path / "driver.c")], check=True)
    monkeypatch.setattr(nvml, "LIBRARY", str(library))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    findings = list(doctor_checks.gpu())
    if failure:
        assert [finding.status for finding in findings] == ["info"]
        assert "NVML error 9" in findings[0].detail
        return
    driver, devices = nvml.read()
    assert driver == "570.1"
    assert [(d.name, d.total, d.free) for d in devices] == [
        ("First", 24 << 30, 6 << 30), ("Second", 24 << 30, 6 << 30),
    ]  # fmt: skip
    assert "6.0 of 24.0 GiB free" in findings[0].detail
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvml.read()[1] == []
