"""Faults of the machine under the process: CPU, GPU, the mapped model, an early Ctrl-C."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import make_bundle
from fault_tools import ROOT, TINY, batch_list, command
from kernel_cases import random_case
from kernel_emulation import HostDevice, build_emulation

import mse_kernels
from mse_kernels import _cpu, reference
from mse_kernels._cuda import CudaAdapter
from mse_kernels.errors import KernelError
from mse_runtime import Analyzer, load_bundle
from mse_runtime.adapter import AdapterInputError, OnnxAdapter, open_adapter
from mse_runtime.errors import BackboneError, DeviceError
from mse_runtime.features.npz import load_npz

# -- a CPU without AVX2 ------------------------------------------------------------------------

OLD_CPU = "SandyBridge"  # AVX, but neither AVX2 nor FMA


@pytest.fixture
def old_cpu(tmp_path: Path) -> str:
    """A Python on an emulated CPU, its children included."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or os.uname().machine != "x86_64":
        pytest.skip("no qemu-x86_64 (package qemu-user): the CPU cannot be emulated")
    python = tmp_path / "python"
    real = Path(sys.executable).resolve()
    python.write_text(f'#!/bin/sh\nexec {emulator} -cpu {OLD_CPU} {real} "$@"\n')
    python.chmod(0o755)
    return str(python)


def on_the_old_cpu(python: str, code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    begin = f"import sys; sys.executable = {python!r}; sys.path[:] = {sys.path!r}\n"
    built = next((str(path) for path in _cpu._paths() if path.is_file()), "")
    return subprocess.run(
        [python, "-c", begin + code, *map(str, arguments)],
        env={**os.environ, "MSE_KERNELS_LIBRARY": built},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_without_avx2_the_kernels_take_the_plain_path(old_cpu: str, tmp_path: Path) -> None:
    if _cpu.reason():
        pytest.skip(str(_cpu.reason()))
    case = random_case(0)
    want = reference.forward(case.weights, *case.inputs)["pseudo"]
    code = (
        "import numpy as np, mse_kernels\n"
        "from kernel_cases import random_case\n"
        "from mse_kernels import _cpu\n"
        "case = random_case(0)\n"
        "opened = mse_kernels.open('cpu', case.weights)\n"
        "opened(*case.inputs).tofile(sys.argv[1])\n"
        "print(opened.isa, ','.join(_cpu.isas()))\n"
    )
    done = on_the_old_cpu(old_cpu, code, tmp_path / "out")
    assert done.stdout.split() == ["scalar", "scalar"], done.stderr
    got = np.fromfile(tmp_path / "out", np.float32).reshape(want.shape)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_without_avx2_llama_cpp_dies_in_the_probe_and_not_here(
    old_cpu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where llama.cpp was built for this very CPU, as `make demo` does: one paragraph, exit 6."""
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    arguments = ["mse-run", "--plan", "--offline"]
    code = f"sys.argv = {arguments!r}\nfrom mse_runtime.entry import mse_run\nmse_run()"
    done = on_the_old_cpu(old_cpu, code)
    if done.returncode == 0:
        pytest.skip("this llama.cpp was built for older CPUs, too")
    assert done.returncode == 6, done.stderr
    assert "does not run on this CPU at all" in done.stderr
    assert "SIGILL" in done.stderr
    assert "Rebuild it" in done.stderr


def test_another_instruction_set_gives_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if _cpu.reason():
        pytest.skip(str(_cpu.reason()))
    batch_list(tmp_path, 1)
    features, answers = load_npz(tmp_path / "f.npz"), {}
    for isa in _cpu.isas():
        monkeypatch.setenv("MSE_KERNELS_ISA", isa)
        with Analyzer.open("tiny", adapter="kernels-cpu") as analyzer:
            answers[isa] = analyzer.analyze_features(features, "I love it.").value
    assert len(answers) >= 1
    assert "scalar" in answers
    assert np.ptp(list(answers.values())) < 1e-3
    monkeypatch.setenv("MSE_KERNELS_ISA", "nothing")
    with pytest.raises(DeviceError, match="this machine runs"):
        open_adapter(load_bundle(TINY), "kernels-cpu")


# -- a GPU that goes ---------------------------------------------------------------------------


class GoingDevice(HostDevice):
    """The emulated GPU; from the `left`-th call on the driver answers like one that lost it."""

    left = 2

    def synchronize(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KernelError("CUDA: cuStreamSynchronize failed: GPU is lost (code 46)")
        super().synchronize()

    def free(self, address: int) -> None:
        if self.left < 0:
            raise KernelError("CUDA: cuMemFree_v2 failed: GPU is lost (code 46)")
        super().free(address)


@pytest.fixture
def emulated_gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_emulation(tmp_path_factory.mktemp("emulation"))


def inputs_for(info: Any, seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    found: list[Any] = []
    for steps, width in ((9, info.audio_dim), (4, info.face_dim), (5, info.n_embd)):
        found += [rng.standard_normal((1, steps, width), np.float32), np.array([steps])]
    return tuple(found)


def test_a_gpu_that_goes_in_the_middle(
    emulated_gpu: ctypes.CDLL,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_bundle(tmp_path / "toy", onnx=True)
    bundle = load_bundle(tmp_path / "toy")

    def on_gpu(_backend: str, weights: Any, _threads: int) -> CudaAdapter:
        from mse_kernels.weights import Weights

        return CudaAdapter(Weights.of(weights), "f32", GoingDevice(emulated_gpu))

    real = mse_kernels.open
    monkeypatch.setattr(
        mse_kernels, "open", lambda name, *rest: (on_gpu if name == "cuda" else real)(name, *rest)
    )
    adapter, plain = open_adapter(bundle, "kernels-cuda"), open_adapter(bundle, "numpy")
    with caplog.at_level(logging.WARNING, "mse_runtime"):
        for call in range(5):
            inputs = inputs_for(bundle.adapter, call)
            got, want = adapter(*inputs), plain(*inputs)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
            assert (adapter.name == "kernels-cuda") == (call < 2)
    assert "GPU is lost" in adapter.choice
    assert [record.getMessage().count("goes on on the CPU") for record in caplog.records] == [1]
    with pytest.raises(AdapterInputError):
        adapter(*(array[:, :, :1] if array.ndim == 3 else array for array in inputs))
    adapter.close()


def test_onnx_runtime_losing_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_bundle(tmp_path / "toy", onnx=True)
    bundle = load_bundle(tmp_path / "toy")

    class Lost(OnnxAdapter):
        def __init__(self, *args: Any, provider: str = "cpu", **options: Any) -> None:
            super().__init__(*args, **options)
            self._cuda = provider == "cuda"
            self.name = "onnx-cuda" if self._cuda else "onnx"

        def _run(self, inputs: Any) -> Any:
            if self._cuda:
                raise RuntimeError("CUDA failure 46: all CUDA-capable devices are busy")
            return super()._run(inputs)

    monkeypatch.setattr("mse_runtime.adapter.backends.OnnxAdapter", Lost)
    adapter = open_adapter(bundle, "onnx", provider="cuda")
    assert adapter.name == "onnx-cuda"
    adapter(*inputs_for(bundle.adapter))
    assert adapter.name != "onnx-cuda"
    assert "CUDA failure 46" in caplog.text


# -- the model's file --------------------------------------------------------------------------


@pytest.fixture
def own_tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.fixture
def answering(own_tiny: Path, tmp_path: Path) -> Iterator[Any]:
    """`say(text)` of a model of the test's own, which is mapped, not read."""
    batch_list(tmp_path, 1)
    features = load_npz(tmp_path / "f.npz")
    with Analyzer.open(own_tiny, adapter="numpy", low_memory=True) as analyzer:
        yield lambda text: analyzer.analyze_features(features, text).answer.distribution


def test_a_model_replaced_while_mapped_answers_as_before(answering: Any, own_tiny: Path) -> None:
    before = [answering("I love it."), answering("It was awful, every minute.")]
    noise = np.random.default_rng(0).bytes((own_tiny / "backbone.gguf").stat().st_size)
    (own_tiny / "new").write_bytes(noise)
    (own_tiny / "new").replace(own_tiny / "backbone.gguf")
    assert [answering("I love it."), answering("It was awful, every minute.")] == before
    (own_tiny / "backbone.gguf").unlink()
    assert answering("I love it.") == before[0]


@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_a_model_overwritten_in_place_is_refused(
    damage: str, own_tiny: Path, tmp_path: Path
) -> None:
    """In a child: between the check and the answer a file that is cut still ends the process."""
    batch_list(tmp_path, 1)
    code = (
        "import os, sys\n"
        "from mse_runtime import Analyzer\n"
        "from mse_runtime.errors import BackboneError\n"
        "from mse_runtime.features.npz import load_npz\n"
        f"path = {str(own_tiny / 'backbone.gguf')!r}\n"
        f"found = load_npz({str(tmp_path / 'f.npz')!r})\n"
        f"with Analyzer.open({str(own_tiny)!r}, adapter='numpy', low_memory=True) as analyzer:\n"
        "    analyzer.analyze_features(found, 'I love it.')\n"
        f"    if {damage!r} == 'cut': os.truncate(path, 5000)\n"
        "    else:\n"
        "        with open(path, 'r+b') as file: file.seek(100_000); file.write(bytes(5_000_000))\n"
        "    for _ in range(2):\n"
        "        try: analyzer.analyze_features(found, 'Another text.')\n"
        "        except BackboneError as error: print(error, flush=True)\n"
        "os._exit(7)\n"
    )
    done = command(before=code)
    assert done.returncode == 7, done.stderr
    assert done.stdout.count("was changed while it was in use") == 2


def test_a_model_cut_in_place_is_refused_by_the_header_scan(own_tiny: Path) -> None:
    from mse_runtime.gguf import Gguf

    with Gguf.open(own_tiny / "backbone.gguf") as found:
        os.truncate(own_tiny / "backbone.gguf", 4096)
        for read in (lambda: found.rows([300]), lambda: found.tensor("token_embd.weight")):
            with pytest.raises(BackboneError, match="was changed"):
                read()


# -- Ctrl-C before anything happened -----------------------------------------------------------


@pytest.mark.parametrize("name", ["mse_run", "mse_eval", "mse_doctor", "mse_export", "mse_train"])
def test_ctrl_c_while_libraries_load_is_quiet(name: str) -> None:
    """Sent the moment the first library of the start has been imported."""
    code = f"from mse_runtime.entry import {name}; {name}()"
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", code, "--help"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as child:  # fmt: skip
        assert child.stderr is not None
        for line in child.stderr:
            if line.rsplit("|", 1)[-1].strip().startswith("click"):
                break
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
    words = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert "Traceback" not in said, said
    assert child.returncode in (0, 130)  # 0: it was done before the signal came
    if child.returncode == 130:
        assert f"{name.replace('_', '-')}: interrupted" in words[-1]
