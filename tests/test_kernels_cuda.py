"""The CUDA path without a GPU: compiled for every target, and its source run on a host emulation.

Nothing here is a run on a GPU; see test_on_a_gpu for what runs where there is one.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import Case, load_golden, random_case, random_weights
from kernel_emulation import HostDevice, build_emulation

import mse_kernels
from mse_kernels import _build_cubins as cubins
from mse_kernels import _driver, reference
from mse_kernels._cuda import CudaAdapter
from mse_kernels.weights import Weights

FOLDER = cubins.FOLDER
INDEX = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_emulation(tmp_path_factory.mktemp("emulation"))


def run(lib: ctypes.CDLL, case: Case, storage: str = "f32", *, falling: bool = False) -> np.ndarray:
    device = HostDevice(lib, falling=falling)
    with CudaAdapter(Weights.of(case.weights), storage, device) as adapter:
        out = adapter(*case.inputs)
    assert device.allocations == 0
    return out


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_emulated_golden(emulation: ctypes.CDLL, test_data: Callable[[str], Path]) -> None:
    case, expected = load_golden(test_data("golden/adapter"), "qwen-meld")
    got = run(emulation, case)
    assert error(got[:, :, ::16], expected["pseudo_every_16th"]) <= 1e-5


@pytest.mark.parametrize("hidden", [(64, 32), (16, 64), (20, 9), (72, 16)])
@pytest.mark.parametrize("batch", [1, 5])
def test_emulated_shapes(emulation: ctypes.CDLL, hidden: tuple[int, int], batch: int) -> None:
    weights = random_weights(1, 13, 37, hidden, width=96, n_pseudo=3)
    case = random_case(2, batch, (71, 9, 6), weights)
    case.audio_len[0] = 0
    case.video_len[-1] = 9
    want = reference.forward(*case, dtype=np.float64)["pseudo"]
    got = run(emulation, case)
    assert error(got, want) <= 1e-5
    # Another order of the threads gives the same bits, or a barrier is missing.
    np.testing.assert_array_equal(run(emulation, case, falling=True), got)


@pytest.mark.parametrize(("storage", "budget"), [("f16", 2e-3), ("bf16", 1.5e-2)])
def test_emulated_storage(emulation: ctypes.CDLL, storage: str, budget: float) -> None:
    case = random_case(3)
    want = reference.forward(*case, dtype=np.float64)["pseudo"]
    got = run(emulation, case, storage)
    assert 0 < error(got, want) <= budget


def test_three_launches_and_a_graph_per_shape(emulation: ctypes.CDLL) -> None:
    device = HostDevice(emulation)
    case = random_case(4)
    with CudaAdapter(Weights.of(case.weights), "f32", device) as adapter:
        first = adapter(*case.inputs)
        assert device.launches == ["mse_project", "mse_lstm", "mse_fuse_f32"]
        assert device.recorded == 0  # a shape that comes once needs no graph
        for _ in range(3):
            np.testing.assert_array_equal(adapter(*case.inputs), first)
        assert device.recorded == 1
        for steps in (10, 11, 12, 10, 11, 13, 14, 15, 10):
            adapter(*random_case(5, 2, (steps, 4, 3), case.weights).inputs)
        assert device.recorded == 3


def test_bad_values_are_refused_before_any_launch(emulation: ctypes.CDLL) -> None:
    device = HostDevice(emulation)
    case = random_case(6, lengths="full")
    case.video[1, 2, 3] = np.nan
    adapter = CudaAdapter(Weights.of(case.weights), "f32", device)
    with pytest.raises(mse_kernels.InputError, match=r"video\[1, 2, 3\] is not finite"):
        adapter(*case.inputs)
    with pytest.raises(mse_kernels.InputError, match=r"audio_len\[0\] is 22, outside 0..21"):
        adapter(*case._replace(audio_len=np.array([22, 1, 1])).inputs)
    assert device.launches == []


def test_shipped_images_match_the_source() -> None:
    assert INDEX["source_sha256"] == cubins.source_hash(cubins.source_path()), (
        "fusion.cu changed: run `python -m mse_kernels._build_cubins`"
    )
    assert sorted(int(t) for t in INDEX["images"]) == sorted(cubins.TARGETS)
    total = 0
    for image in INDEX["images"].values():
        packed = (FOLDER / image["file"]).read_bytes()
        assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == image["sha256"]
        total += len(packed)
    assert total < 700_000


@pytest.mark.parametrize("target", cubins.TARGETS)
def test_every_target_compiles_without_spills(target: int) -> None:
    try:
        lib = cubins.load_nvrtc()
    except OSError as missing:
        pytest.skip(str(missing))
    image, usage = cubins.compile_source(lib, cubins.source_path().read_bytes(), target)
    assert image[:4] == b"\x7fELF"
    fuse = {f"mse_fuse_{s}" for s in ("f32", "f16", "bf16")}
    assert set(usage) == {"mse_project", "mse_lstm", "mse_lstm_any", *fuse}
    for kernel, use in usage.items():
        assert use.spill_stores == use.spill_loads == use.stack == 0, (kernel, use)
        # Threads times registers within the 64 K of a multiprocessor, or it could not launch.
        threads = 1024 if kernel == "mse_lstm_any" else 256
        assert 0 < use.registers * threads <= 65536, (kernel, use)
        assert use.shared <= 48 * 1024
    shipped = INDEX["images"][str(target)]
    assert set(shipped["kernels"]) == set(usage)
    if cubins.version(lib) == INDEX["nvrtc"]:  # the shipped image is this source's, bit for bit
        assert hashlib.sha256(image).hexdigest() == shipped["sha256"]


@pytest.mark.parametrize(
    ("capability", "file"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_103"),
        ((11, 0), "ptx"),
        ((12, 1), "sm_120"),
        ((13, 0), "ptx"),
    ],
)
def test_image_for_a_gpu(capability: tuple[int, int], file: str) -> None:
    name, image = _driver.image_for(*capability)
    assert file in name
    assert image.startswith(b"\x7fELF") or b".target sm_75" in image[:2000]


def test_an_old_gpu_is_refused_by_name() -> None:
    with pytest.raises(mse_kernels.UnavailableError, match=r"7\.0; the kernels need 7\.5"):
        _driver.image_for(7, 0)


def test_without_a_driver_the_reason_is_kept() -> None:
    why = mse_kernels.available()["cuda"]
    if why is None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(mse_kernels.UnavailableError) as caught:
        mse_kernels.open("cuda", random_weights(1))
    assert str(caught.value) == why


@pytest.mark.skipif(mse_kernels.available()["cuda"] is not None, reason="no GPU")
def test_on_a_gpu(test_data: Callable[[str], Path]) -> None:
    for name in ("qwen-meld", "llama2-mosei", "qwen-simsv2", "llama2-cherma"):
        case, expected = load_golden(test_data("golden/adapter"), name)
        with CudaAdapter(Weights.of(case.weights), "f32") as adapter:
            for _ in range(3):
                got = adapter(*case.inputs)
                assert error(got[:, :, ::16], expected["pseudo_every_16th"]) <= 1e-5
