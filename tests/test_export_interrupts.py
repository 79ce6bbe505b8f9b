"""mse-export stopped in the middle: killed, interrupted, out of disk; and going on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
pytest.importorskip("onnx")
pytest.importorskip("sentencepiece")

from export_folders import make_folder

from mse_export import convert, quantize
from mse_export.hf_folder import HfFolder
from mse_export.pipeline import Request, export
from mse_export.quant_types import quant
from mse_runtime.bundle import load_bundle

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
SLOW = "q4_k_m"
MB = 1_000_000
FILE_BYTES = 16 * MB  # about, in Q4_K_M


def child(*arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # A test run started in the background hands an ignored Ctrl-C down to its children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "mse_export.cli", *arguments],
        preexec_fn=prepare,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def grown(out: Path, process: subprocess.Popen[str], size: int) -> Path:
    """The unfinished language model of `out`, once it has `size` bytes."""
    partial = out.with_name(out.name + ".partial") / "backbone.gguf.partial"
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if partial.exists() and partial.stat().st_size >= size:
            break
        time.sleep(0.005)
    return partial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, but large enough to be stopped in the middle."""
    return make_folder(tmp_path_factory.mktemp("interrupts") / "hf", "llama", **SHAPE)


@pytest.fixture(scope="module")
def sources(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    gguf = tmp_path_factory.mktemp("interrupts-gguf") / "source.gguf"
    convert.convert(HfFolder(folder), gguf, quant("f16"), round_bf16=False)
    return {"folder": folder, "gguf": gguf}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are encoded in this process."""
    names: list[str] = []
    original = convert.encode_rows

    def counted(rows: Any, shape: Any, kind: Any, name: str, threads: int) -> Iterator[Any]:
        names.append(name)
        return original(rows, shape, kind, name, threads)

    monkeypatch.setattr(convert, "encode_rows", counted)
    monkeypatch.setattr(quantize, "encode_rows", counted)
    return names


@pytest.mark.parametrize(("kind", "how"), [("folder", signal.SIGKILL), ("gguf", signal.SIGINT)])
def test_quantising_goes_on_where_it_stopped(
    kind: str, how: signal.Signals, sources: dict[str, Path], tmp_path: Path, encoded: list[str]
) -> None:
    out, source = tmp_path / "out", str(sources[kind])
    options = ["--backbone", source, "--init", "random", "--quant", SLOW, "--no-verify"]
    process = child(*options, "--threads", "1", "-o", str(out))
    partial = grown(out, process, 4 * MB)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how), errors
    assert not out.exists()
    assert 4 * MB <= partial.stat().st_size < FILE_BYTES
    request = Request(source, init="random", quant=SLOW, verify=False, threads=1)

    def again(where: Path) -> bytes:
        export(Request(**{**vars(request), "output": where}))
        return (where / "backbone.gguf").read_bytes()

    whole = again(tmp_path / "whole")
    every = len(encoded)
    encoded.clear()
    assert again(out) == whole
    assert 0 < len(encoded) < every - 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert len(list(out.iterdir())) == 5


def test_another_type_starts_afresh(sources: dict[str, Path], tmp_path: Path) -> None:
    """What was made for another --quant is no beginning of this one."""
    out = tmp_path / "out"
    options = ["--backbone", str(sources["gguf"]), "--init", "random", "--no-verify"]
    process = child(*options, "--quant", SLOW, "--threads", "1", "-o", str(out))
    grown(out, process, MB)
    process.kill()
    process.communicate()
    request = Request(str(sources["gguf"]), out, init="random", quant="q8_0", verify=False)
    export(request)
    assert load_bundle(out).backbone.gguf.type == "Q8_0"


def test_an_interrupt_while_verifying_keeps_the_model(
    folder: Path, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mse_export import verify

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    request = Request(str(folder), tmp_path / "out", init="random", quant="q8_0", threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(verify, "verify", stopped)
        with pytest.raises(KeyboardInterrupt):
            export(request)
    assert encoded
    encoded.clear()
    assert not (tmp_path / "out").exists()
    assert {c["result"] for c in export(request).bundle.parity["checks"]} == {"ok"}
    assert encoded == []


def test_interrupted_synthetic(tmp_path: Path) -> None:
    """Ctrl-C during a long write: exit code 130, nothing under the final name."""
    out = tmp_path / "out"
    arguments = ["--backbone", "llama2-7b", "--synthetic", "--init", "random"]
    process = child(*arguments, "--quant", "f16", "-o", str(out))
    grown(out, process, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["q8_0", "synthetic"])
def test_disk_full_half_way(kind: str, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the write fails in the middle."""
    out = tmp_path / "out"
    config = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    folder = make_folder(tmp_path / "hf", "llama", **config)
    arguments = ["--backbone", str(folder), "--init", "random", "-o", str(out), "--no-verify"]
    arguments += ["--quant", "q8_0"] if kind == "q8_0" else ["--quant", "f16"]
    if kind == "synthetic":
        arguments.append("--synthetic")
    process = child(*arguments, limit=3_000_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors
    assert "same command again" in errors
    assert "Traceback" not in errors
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MB of its own; mounting one needs a right that not every user has."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(where)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_disk_that_fills_up(folder: Path, small_disk: Path) -> None:
    """Room enough at the beginning, then something else takes it; with room again it goes on."""
    out, ballast = small_disk / "out", small_disk / "ballast"
    arguments = ["--backbone", str(folder), "--init", "random", "--quant", SLOW]
    arguments += ["--threads", "1", "--no-verify", "-o", str(out)]
    process = child(*arguments)
    partial = grown(out, process, MB)
    process.send_signal(signal.SIGSTOP)
    fill(ballast)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 5, errors
    assert "No space left on device" in errors
    assert "same command again" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    assert partial.stat().st_size >= MB
    ballast.unlink()
    process = child(*arguments)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert load_bundle(out).backbone.gguf.type == SLOW.upper()
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def fill(path: Path) -> None:
    """Take what is free on the disk of `path`."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass


def test_disk_full_while_quantising(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--backbone", str(sources["gguf"]), "--init", "random", "--quant", "q8_0"]
    process = child(*arguments, "-o", str(out), "--no-verify", limit=3_000_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors
    assert "Traceback" not in errors
    assert not out.exists()
    export(Request(str(sources["gguf"]), out, init="random", quant="q8_0", verify=False))
    assert load_bundle(out).backbone.gguf.type == "Q8_0"
    assert not out.with_name("out.partial").exists()
