"""The CUDA path's calls of the driver API, made through ctypes to a driver on the host.

kernels/checks/driver.cpp stands in for `libcuda.so.1`: real signatures, real ordering, kernels run
by the host emulation. Nothing here is a run on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import load_golden, random_case, random_weights
from kernel_emulation import build_emulation

import mse_kernels
from mse_kernels import _cuda, _driver, reference
from mse_kernels.weights import Weights


class FakeDriver:
    """The library, and what it saw."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib

    def machine(
        self, major: int = 8, minor: int = 6, *, gpus: int = 1, sms: int = 3, cooperative: int = 1
    ) -> None:
        self.lib.fake_reset(major, minor, gpus, sms, cooperative)
        _cuda.reason.cache_clear()

    def fail(self, name: str, code: int, after: int = 0) -> None:
        self.lib.fake_fail(name.encode(), code, after)

    def calls(self) -> list[str]:
        return str(self.lib.fake_calls().decode()).split()

    @property
    def live(self) -> int:
        """Contexts, modules, streams, graphs and memory that were not given back."""
        return int(self.lib.fake_live())

    @property
    def violation(self) -> str:
        return str(self.lib.fake_violation().decode())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_emulation(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    monkeypatch.setattr(_driver, "load_driver", lambda: library)
    fake = FakeDriver(library)
    fake.machine()
    yield fake
    _cuda.reason.cache_clear()
    assert fake.violation == ""
    assert fake.live == 0


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_golden_as_a_user_gets_it(
    driver: FakeDriver, library: ctypes.CDLL, test_data: Callable[[str], Path]
) -> None:
    """No injection: `libcuda.so.1` is found by its name, in a process of its own."""
    folder = Path(str(library._name)).parent
    (folder / "libcuda.so.1").symlink_to(library._name)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import numpy as np, mse_kernels, pathlib\n"
        "from kernel_cases import load_golden\n"
        "assert mse_kernels.available()['cuda'] is None, mse_kernels.available()\n"
        "case, expected = load_golden(pathlib.Path(sys.argv[1]), 'qwen-meld')\n"
        "with mse_kernels.open('cuda', case.weights) as adapter:\n"
        "    assert adapter.isa == 'Host driver (not a GPU) (sm_86)', adapter.isa\n"
        "    got = adapter(*case.inputs)[:, :, ::16]\n"
        "want = expected['pseudo_every_16th']\n"
        "print(np.abs(got - want).max() / np.abs(want).max())\n"
    )
    folders = [str(Path(__file__).parent), *sys.path[1:]]
    command = [sys.executable, "-c", code, str(test_data("golden/adapter")), *folders]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-5


def test_golden(driver: FakeDriver, test_data: Callable[[str], Path]) -> None:
    case, expected = load_golden(test_data("golden/adapter"), "qwen-meld")
    with mse_kernels.open("cuda", case.weights) as adapter:
        got = adapter(*case.inputs)
    assert error(got[:, :, ::16], expected["pseudo_every_16th"]) <= 1e-5


QUEUED = [
    *("cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuLaunchKernel", "cuLaunchCooperativeKernel"),
    "cuMemcpyDtoHAsync_v2",
]


def test_the_calls_of_one_shape(driver: FakeDriver) -> None:
    """Three launches at first, recorded when the shape comes again, then the graph alone."""
    case = random_case(1, 2, (9, 5, 4))
    want = reference.forward(*case, dtype=np.float64)["pseudo"]
    with mse_kernels.open("cuda", case.weights) as adapter:
        seen: list[list[str]] = []
        for round_ in range(4):
            case.audio[...] += np.float32(0.0) if round_ < 3 else np.float32(0.25)
            driver.machine()
            got = adapter(*case.inputs)
            seen.append([c for c in driver.calls() if not c.startswith("cuMem") or "cpy" in c])
            if round_ < 3:
                assert error(got, want) <= 1e-5
        inside = ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2")
        assert seen[0] == [inside[0], *QUEUED, "cuStreamSynchronize", inside[1]]
        assert seen[1] == [
            *(inside[0], "cuStreamBeginCapture_v2", *QUEUED, "cuStreamEndCapture"),
            *("cuGraphInstantiateWithFlags", "cuGraphDestroy", "cuGraphLaunch"),
            *("cuStreamSynchronize", inside[1]),
        ]
        graph = [inside[0], "cuGraphLaunch", "cuStreamSynchronize", inside[1]]
        assert seen[2] == seen[3] == graph
        # New values in the same shape reach the kernels through the graph.
        assert error(got, reference.forward(*case, dtype=np.float64)["pseudo"]) <= 1e-5


def test_shapes_come_and_go(driver: FakeDriver) -> None:
    """More shapes than are kept, some recorded, and a batch that is cut in two."""
    weights = random_weights(2, 5, 6, (16, 20), width=64, n_pseudo=2)
    sizes = [(1, (3, 2, 1)), (1, (3, 2, 1)), *((2, (t, 0, 1)) for t in range(6)), (66, (2, 1, 1))]
    with mse_kernels.open("cuda", weights, storage="f16") as adapter:
        for seed, (batch, steps) in enumerate(sizes):
            case = random_case(seed, batch, steps, weights)
            want = reference.forward(*case, dtype=np.float64)["pseudo"]
            assert error(adapter(*case.inputs), want) <= 5e-3
        assert adapter(*random_case(0, 0, (3, 2, 1), weights).inputs).shape == (0, 2, 64)


def test_length_zero_everywhere(driver: FakeDriver) -> None:
    case = random_case(3)
    zeros = np.zeros(3, np.int64)
    none = case._replace(audio_len=zeros, video_len=zeros, text_len=zeros)
    with mse_kernels.open("cuda", case.weights) as adapter:
        assert error(adapter(*none.inputs), reference.forward(*none)["pseudo"]) <= 1e-6


@pytest.mark.parametrize(
    "name", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"]
)
def test_without_graphs_it_goes_on(driver: FakeDriver, name: str) -> None:
    case = random_case(4, 2, (9, 5, 4))
    with mse_kernels.open("cuda", case.weights) as adapter:
        first = adapter(*case.inputs)
        driver.fail(name, 801)
        for _ in range(3):
            np.testing.assert_array_equal(adapter(*case.inputs), first)
    assert "cuGraphLaunch" not in driver.calls()


def test_a_launch_that_no_capture_takes(driver: FakeDriver) -> None:
    case = random_case(4, 2, (9, 5, 4))
    with mse_kernels.open("cuda", case.weights) as adapter:
        first = adapter(*case.inputs)
        driver.fail("cuLaunchCooperativeKernel", 900)
        for _ in range(3):
            np.testing.assert_array_equal(adapter(*case.inputs), first)


OPENING = [
    *("cuInit", "cuDeviceGetCount", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2"),
    *("cuModuleLoadData", "cuModuleGetFunction", "cuStreamCreate"),
]


@pytest.mark.parametrize("name", OPENING)
def test_a_driver_that_fails_is_a_reason(driver: FakeDriver, name: str) -> None:
    driver.fail(name, 999)
    why = mse_kernels.available()["cuda"]
    assert why is not None
    assert f"{name} failed: error 999" in why
    with pytest.raises(mse_kernels.UnavailableError):
        mse_kernels.open("cuda", random_weights(1))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"gpus": 0}, "sees no GPU"),
        ({"major": 7, "minor": 0}, "needs? 7.5 or newer"),
        ({"cooperative": 0}, "no cooperative launch"),
    ],
)
def test_a_gpu_that_does_not_fit(driver: FakeDriver, machine: dict[str, int], message: str) -> None:
    driver.machine(**machine)
    with pytest.raises(mse_kernels.UnavailableError, match=message):
        mse_kernels.open("cuda", random_weights(1))


@pytest.mark.parametrize(
    ("capability", "image"),
    [((7, 5), "sm_75"), ((9, 0), "sm_90"), ((12, 1), "sm_120"), ((13, 0), "ptx")],
)
def test_the_image_holds_every_kernel(
    driver: FakeDriver, capability: tuple[int, int], image: str
) -> None:
    driver.machine(*capability)
    device = _driver.CudaDevice()
    assert image in device.image
    device.close()


@pytest.mark.parametrize("after", [0, 3, 19])
def test_weights_that_do_not_fit(driver: FakeDriver, after: int) -> None:
    weights = random_weights(1)
    assert mse_kernels.available()["cuda"] is None
    driver.fail("cuMemAlloc_v2", 2, after)
    with pytest.raises(mse_kernels.KernelError, match="cuMemAlloc_v2 failed"):
        mse_kernels.open("cuda", weights)
    assert driver.live == 0


@pytest.mark.parametrize("after", [0, 2, 9])
def test_a_shape_that_does_not_fit(driver: FakeDriver, after: int) -> None:
    """It leaves nothing behind, and the next try, with more memory, works."""
    case = random_case(5, 2, (9, 5, 4))
    want = reference.forward(*case, dtype=np.float64)["pseudo"]
    with mse_kernels.open("cuda", case.weights) as adapter:
        before = driver.live
        driver.fail("cuMemAlloc_v2", 2, after)
        with pytest.raises(mse_kernels.KernelError, match="cuMemAlloc_v2 failed"):
            adapter(*case.inputs)
        assert driver.live == before
        assert error(adapter(*case.inputs), want) <= 1e-5


def test_host_memory_runs_out(driver: FakeDriver) -> None:
    case = random_case(5, 2, (9, 5, 4))
    with mse_kernels.open("cuda", case.weights) as adapter:
        driver.fail("cuMemAllocHost_v2", 2, 1)
        with pytest.raises(mse_kernels.KernelError, match="cuMemAllocHost_v2 failed"):
            adapter(*case.inputs)


@pytest.mark.parametrize("name", ["cuLaunchKernel", "cuLaunchCooperativeKernel"])
def test_an_error_on_the_way_is_named(driver: FakeDriver, name: str) -> None:
    case = random_case(6, 2, (9, 5, 4))
    want = reference.forward(*case, dtype=np.float64)["pseudo"]
    with mse_kernels.open("cuda", case.weights) as adapter:
        driver.fail(name, 700)
        with pytest.raises(mse_kernels.KernelError, match=f"{name} failed: error 700"):
            adapter(*case.inputs)
        assert error(adapter(*case.inputs), want) <= 1e-5


def test_from_other_threads(driver: FakeDriver) -> None:
    """A context is current per thread: opened here, called and closed elsewhere."""
    from concurrent.futures import ThreadPoolExecutor

    case = random_case(7, 2, (9, 5, 4))
    adapter = mse_kernels.open("cuda", case.weights)
    want = adapter(*case.inputs)
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: adapter(*case.inputs), range(6)):
            np.testing.assert_array_equal(got, want)
        pool.submit(adapter.close).result()
    with pytest.raises(mse_kernels.KernelError, match="closed"):
        adapter(*case.inputs)


def test_two_adapters_share_the_device(driver: FakeDriver) -> None:
    cases = [random_case(s, 1, (5, 4, 3)) for s in (8, 9)]
    adapters = [mse_kernels.open("cuda", c.weights) for c in cases]
    for _ in range(2):
        for adapter, case in zip(adapters, cases, strict=True):
            want = reference.forward(*case, dtype=np.float64)["pseudo"]
            assert error(adapter(*case.inputs), want) <= 1e-5
    for adapter in adapters:
        adapter.close()


def test_too_wide_for_cuda_is_refused_before_the_driver(driver: FakeDriver) -> None:
    weights = Weights.of(random_weights(1, hidden=(257, 16)))
    with pytest.raises(mse_kernels.WeightsError, match="hidden width up to 256"):
        _cuda.CudaAdapter(weights, "f32")
    assert driver.calls() == []
