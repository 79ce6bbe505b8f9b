"""Adapter backends: the same numbers, refused inputs, and how `auto` chooses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import AUDIO, FACE, N_PSEUDO, WIDTH, edit, file_ref, make_bundle
from goldens import compare_adapter_outputs, load_adapter_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mse_runtime import cache
from mse_runtime.adapter import (
    Adapter,
    AdapterInputError,
    NumpyAdapter,
    OnnxAdapter,
    kernel_reasons,
    open_adapter,
)
from mse_runtime.adapter import auto as adapter_auto
from mse_runtime.adapter import backends as adapter
from mse_runtime.adapter.weights import load_weights, parameter_shapes
from mse_runtime.bundle import AdapterInfo, Bundle, FileRef, MismatchError, load_bundle
from mse_runtime.errors import BundleError, DeviceError, UsageError

onnx = pytest.importorskip("onnx")

RUNNABLE = ["onnx", "numpy", *(name for name, reason in kernel_reasons().items() if not reason)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder; do not change it."""
    place = tmp_path_factory.mktemp("bundle")
    make_bundle(place, onnx=True)
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


def inputs(
    seed: int = 0, batch: int = 2, steps: tuple[int, int, int] = (30, 7, 9), **changes: Any
) -> dict[str, Any]:
    """Random inputs with lengths between 0 and all steps; `changes` replace some of them."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, length, width in zip(
        ("audio", "video", "text"), steps, (AUDIO, FACE, WIDTH), strict=True
    ):
        found[name] = rng.standard_normal((batch, length, width), dtype=np.float32)
        found[f"{name}_len"] = rng.integers(0, length + 1, batch)
    return found | changes


def close(found: NDArray[Any], reference: NDArray[Any], tolerance: float = 1e-5) -> bool:
    return float(np.abs(found - reference).max()) <= tolerance * float(np.abs(reference).max())


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNABLE)
def test_backends_agree(bundle: Bundle, name: str) -> None:
    reference = open_adapter(bundle, "numpy")
    opened = open_adapter(bundle, name, threads=2)
    try:
        assert (opened.name, opened.n_pseudo, opened.n_embd) == (name, N_PSEUDO, WIDTH)
        for seed in range(5):
            given_inputs = inputs(seed)
            pseudo = opened(**given_inputs)
            assert pseudo.shape == (2, N_PSEUDO, WIDTH)
            assert pseudo.dtype == np.float32
            assert close(pseudo, reference(**given_inputs))
    finally:
        opened.close()


@pytest.mark.parametrize("name", RUNNABLE)
def test_rows_behind_the_length_do_not_matter(bundle: Bundle, name: str) -> None:
    opened = open_adapter(bundle, name)
    plain = inputs(batch=1, audio_len=np.array([11]), video_len=np.array([0]))
    plain["text_len"] = np.array([4])
    expected = opened(**plain)
    for rows, length in (("audio", 11), ("video", 0), ("text", 4)):
        plain[rows][:, length:] = np.nan
    assert np.array_equal(opened(**plain), expected)


@pytest.mark.parametrize("name", RUNNABLE)
def test_different_inputs_give_different_tokens(bundle: Bundle, name: str) -> None:
    opened = open_adapter(bundle, name)
    full = {"audio_len": np.array([30]), "video_len": np.array([7]), "text_len": np.array([9])}
    base = inputs(batch=1, **full)
    expected = opened(**base)
    for rows in ("audio", "video", "text"):
        assert not close(opened(**(base | {rows: base[rows] * 2})), expected, 1e-4)


@pytest.mark.parametrize("name", ["qwen-meld", "llama2-mosei"])
def test_published_adapters(test_data: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """The published implementation's own numbers, through both file formats."""
    from mse_export import onnx_graph

    golden = load_adapter_golden(test_data("golden/adapter"), name)
    onnx_graph.save(onnx_graph.build(golden.weights), tmp_path / "adapter.onnx")
    info = published_info(golden.info)
    for opened in (
        OnnxAdapter(tmp_path / "adapter.onnx", info),
        NumpyAdapter(dict(golden.weights), info),
    ):
        errors = compare_adapter_outputs({"pseudo": opened(**golden.inputs)}, golden)
        assert max(errors.values()) < 1e-5, errors
    shapes = {name: tuple(value.shape) for name, value in golden.weights.items()}
    assert parameter_shapes(info) == shapes


def published_info(info: dict[str, Any]) -> AdapterInfo:
    nothing = FileRef("x", 1, "0" * 64)
    return AdapterInfo(
        onnx=nothing,
        weights=nothing,
        n_pseudo=info["pseudo_tokens"],
        n_embd=info["D"],
        audio_dim=info["audio"]["dim"],
        face_dim=info["video"]["dim"],
        audio_hidden=info["audio"]["hidden"],
        face_hidden=info["video"]["hidden"],
        parameters=1,
    )


# -- inputs ------------------------------------------------------------------------------------

NAN_ROW = np.full((2, 30, AUDIO), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"audio": np.zeros((2, 30, AUDIO))}, "float32, not float64"),
        ({"audio": np.zeros((2, 30, AUDIO + 1), np.float32)}, f"steps, {AUDIO}]"),
        ({"video": np.zeros((2, FACE), np.float32)}, "[2, 167]"),
        ({"text": np.zeros((2, 0, WIDTH), np.float32)}, "[2, 0, 64]"),
        ({"text": np.zeros((3, 9, WIDTH), np.float32)}, "one batch size"),
        ({"video_len": np.array([1])}, "one batch size"),
        ({"audio_len": np.array([[1], [1]])}, "one batch size"),
        ({"audio_len": np.array([1.0, 2.0])}, "whole numbers"),
        ({"audio_len": np.array([1, 31])}, "between 0 and the 30 steps"),
        ({"video_len": np.array([-1, 3])}, "between 0 and the 7 steps"),
        ({"audio": NAN_ROW, "audio_len": np.array([0, 1])}, "NaN"),
        ({"text": np.full((2, 9, WIDTH), np.inf, np.float32), "text_len": np.array([9, 9])}, "NaN"),
        ({"audio": "clip.wav"}, "float32"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["onnx", "numpy"])
def test_inputs_that_are_refused(
    bundle: Bundle, name: str, changes: dict[str, Any], expected: str
) -> None:
    opened = open_adapter(bundle, name)
    with pytest.raises(AdapterInputError) as caught:
        opened(**inputs(**changes))
    assert expected in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 5),
    steps=st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 30)),
)
def test_any_shape_and_length(
    bundle: Bundle, seed: int, batch: int, steps: tuple[int, int, int]
) -> None:
    given_inputs = inputs(seed, batch, steps)
    found = opened_onnx(bundle)(**given_inputs)
    assert close(found, open_adapter(bundle, "numpy")(**given_inputs))


def opened_onnx(bundle: Bundle) -> Adapter:
    return open_adapter(bundle, "onnx")


# -- bad files ---------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A bundle that the test may change."""
    make_bundle(tmp_path / "own", onnx=True)
    return tmp_path / "own"


def rewrite_onnx(own: Path, data: bytes) -> Bundle:
    (own / "adapter.onnx").write_bytes(data)
    edit(own, "adapter.onnx", file_ref(own / "adapter.onnx"))
    return load_bundle(own)


@pytest.mark.parametrize("data", [b"x", b"no graph" * 9, b"\x08\x0a" + bytes(50)])
def test_onnx_that_is_none(own: Path, data: bytes) -> None:
    broken = rewrite_onnx(own, data)
    with pytest.raises(BundleError, match=r"adapter\.onnx is no adapter") as caught:
        open_adapter(broken, "onnx")
    assert "\n" not in str(caught.value)


def test_onnx_cut_short(own: Path) -> None:
    broken = rewrite_onnx(own, (own / "adapter.onnx").read_bytes()[:-1000])
    with pytest.raises(BundleError):
        open_adapter(broken, "onnx")


def test_onnx_of_another_adapter(own: Path, tmp_path: Path) -> None:
    graph = onnx.load(own / "adapter.onnx")
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value = AUDIO
    edit(own, "adapter.n_pseudo", N_PSEUDO + 1)
    with pytest.raises(MismatchError, match=r"pseudo has the shape"):
        open_adapter(load_bundle(own), "onnx")
    identity = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["pseudo"])],
        "other",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("pseudo", onnx.TensorProto.FLOAT, [1])],
    )
    model = onnx.helper.make_model(
        identity, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    with pytest.raises(MismatchError, match="no MSE adapter"):
        open_adapter(rewrite_onnx(own, model.SerializeToString()), "onnx")


def test_onnx_cannot_pull_in_other_files(own: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """External tensor data is refused, both outside of the folder and beside the graph."""
    secret = tmp_path / "secret.bin"
    model = onnx.load(own / "adapter.onnx")
    tensor = max(model.graph.initializer, key=lambda found: len(found.raw_data))
    secret.write_bytes(tensor.raw_data)
    (own / "secret.bin").write_bytes(tensor.raw_data)
    for place in ("../secret.bin", "secret.bin", str(secret)):
        monkeypatch.chdir(own)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=place)
        with pytest.raises(BundleError):
            open_adapter(rewrite_onnx(own, model.SerializeToString()), "onnx")


@pytest.mark.parametrize("name", ["numpy", *RUNNABLE[2:]])
def test_weights_that_are_none(own: Path, name: str) -> None:
    (own / "adapter.safetensors").write_bytes(b"\xff" * 64)
    edit(own, "adapter.weights", file_ref(own / "adapter.safetensors"))
    with pytest.raises(BundleError, match="cannot be read as safetensors"):
        open_adapter(load_bundle(own), name)


@pytest.mark.parametrize("fault", ["missing", "shape", "type"])
def test_weights_of_another_adapter(own: Path, fault: str) -> None:
    path = own / "adapter.safetensors"
    weights = load_file(path)
    key = "text_guide_mixer.text_mlp.weight"
    if fault == "missing":
        del weights[key]
    else:
        weights[key] = weights[key][:-1] if fault == "shape" else weights[key].astype(np.float64)
    save_file(weights, path)
    edit(own, "adapter.weights", file_ref(path))
    with pytest.raises(MismatchError, match=r"text_mlp\.weight"):
        load_weights(load_bundle(own))


def test_half_precision_weights(own: Path, bundle: Bundle) -> None:
    path = own / "adapter.safetensors"
    halves = {name: value.astype(np.float16) for name, value in load_file(path).items()}
    save_file(halves, path)
    edit(own, "adapter.weights", file_ref(path))
    given_inputs = inputs()
    found = open_adapter(load_bundle(own), "numpy")(**given_inputs)
    assert close(found, open_adapter(bundle, "numpy")(**given_inputs), 1e-2)


# -- backends and devices ----------------------------------------------------------------------


def test_unknown_backend(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="kernels-cpu"):
        open_adapter(bundle, "tensorflow")
    with pytest.raises(UsageError, match="at least 1 thread"):
        open_adapter(bundle, "onnx", threads=0)


def test_threads_are_as_asked(bundle: Bundle) -> None:
    """A fresh process gains no thread with 1, and one worker with 2."""
    code = (
        "import os, sys, onnxruntime\n"
        "from pathlib import Path\n"
        "from mse_runtime.bundle import load_bundle\n"
        "from mse_runtime.adapter import open_adapter\n"
        f"bundle = load_bundle({str(bundle.path)!r})\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "opened = open_adapter(bundle, 'onnx', threads=int(sys.argv[1]))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    for threads in (1, 2):
        child = subprocess.run(
            [sys.executable, "-c", code, str(threads)], capture_output=True, text=True, timeout=60
        )
        assert child.stdout.strip() == str(threads - 1), child.stderr


def test_cuda_is_never_replaced_in_silence(bundle: Bundle) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this wheel has the CUDA provider")
    for name in ("onnx", "numpy", "kernels-cpu"):
        with pytest.raises(DeviceError):
            open_adapter(bundle, name, provider="cuda")
    if kernel_reasons()["kernels-cuda"]:
        with pytest.raises(DeviceError, match="kernels-cuda"):
            open_adapter(bundle, "kernels-cuda")
        with pytest.raises(DeviceError, match=r"mse-runtime\[gpu\]"):
            open_adapter(bundle, "auto", provider="cuda")


def test_a_kernel_that_is_missing_says_why(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mse_kernels", None)
    with pytest.raises(DeviceError, match="mse_kernels"):
        open_adapter(bundle, "kernels-cpu")
    assert open_adapter(bundle, "auto").name == "onnx"


def test_without_onnx_runtime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"pip install 'mse-runtime\[cpu\]'"):
        open_adapter(bundle, "onnx")
    opened = open_adapter(bundle, "auto")
    assert opened.name in ("kernels-cpu", "numpy")
    assert "no ONNX Runtime" in opened.choice


# -- auto --------------------------------------------------------------------------------------


class Rival(NumpyAdapter):
    """A stand-in for a kernel whose speed and correctness the test decides."""

    seconds = 0.0
    factor = 1.0
    opened = 0

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(load_weights(bundle), bundle.adapter)
        self.name = "kernels-cpu"
        self._answers: dict[bytes, Any] = {}
        type(self).opened += 1

    def _run(self, given_inputs: Any) -> Any:
        time.sleep(self.seconds)
        key = given_inputs[0].tobytes()
        if key not in self._answers:
            self._answers[key] = super()._run(given_inputs) * np.float32(self.factor)
        return self._answers[key]


@pytest.fixture
def rival(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle
) -> Callable[..., type[Rival]]:
    """Puts a `Rival` in the place of `kernels-cpu`, with an empty cache."""
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))

    def make(**settings: float) -> type[Rival]:
        kind = type("Rival", (Rival,), {"opened": 0, **settings})
        real = adapter.open_backend

        def open_backend(b: Bundle, name: str, threads: int, provider: Any) -> Any:
            if name == "kernels-cpu":
                return kind(b)
            opened = real(b, name, threads, provider)
            run = opened._run
            # Far from the rival's times, so that load on the machine cannot turn the result.
            opened._run = lambda given_inputs: (time.sleep(0.01), run(given_inputs))[1]
            return opened

        monkeypatch.setattr(adapter_auto, "open_backend", open_backend)
        return kind

    return make


def facts() -> list[dict[str, Any]]:
    return list(cache.read_json(adapter_auto.FILE).values())


def test_auto_takes_the_faster_one_and_remembers(
    rival: Callable[..., type[Rival]], bundle: Bundle
) -> None:
    kind = rival(seconds=0.0)
    opened = open_adapter(bundle, "auto")
    assert opened.name == "kernels-cpu"
    assert "measured on this machine" in opened.choice
    again = open_adapter(bundle, "auto")
    assert again.choice == opened.choice
    assert kind.opened == 2
    assert len(facts()) == 1


def test_auto_keeps_onnx_where_the_kernel_is_slower(
    rival: Callable[..., type[Rival]], bundle: Bundle
) -> None:
    kind = rival(seconds=0.05)
    assert open_adapter(bundle, "auto").name == "onnx"
    assert open_adapter(bundle, "auto").name == "onnx"
    assert kind.opened == 1


def test_auto_refuses_a_kernel_that_is_wrong(
    rival: Callable[..., type[Rival]], bundle: Bundle
) -> None:
    rival(factor=1.001)
    opened = open_adapter(bundle, "auto")
    assert opened.name == "onnx"
    assert "differs from onnx" in opened.choice


def test_auto_refuses_a_kernel_that_gives_nan(
    rival: Callable[..., type[Rival]], bundle: Bundle
) -> None:
    rival(factor=float("nan"))
    assert open_adapter(bundle, "auto").name == "onnx"


def test_auto_measures_again_for_other_threads(
    rival: Callable[..., type[Rival]], bundle: Bundle
) -> None:
    rival()
    open_adapter(bundle, "auto")
    open_adapter(bundle, "auto", threads=2)
    assert len(facts()) == 2


@pytest.mark.parametrize("content", [None, "[]", '{"a": ', "x"])
def test_auto_without_a_cache(
    rival: Callable[..., type[Rival]],
    bundle: Bundle,
    tmp_path: Path,
    content: str | None,
) -> None:
    rival()
    if content is None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        opened = open_adapter(bundle, "auto")
        assert opened.name == "onnx"
        assert "cannot be written" in opened.choice
    else:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / adapter_auto.FILE).write_text(content)
        assert open_adapter(bundle, "auto").name == "kernels-cpu"


def test_auto_survives_a_kernel_that_kills_the_process(
    rival: Callable[..., type[Rival]], bundle: Bundle, folder: Path
) -> None:
    """The first run dies in the kernel, in a process of its own; the next one avoids it."""
    code = (
        "import os, signal\n"
        "from mse_runtime.adapter import auto as adapter_auto, open_adapter\n"
        "from mse_runtime.bundle import load_bundle\n"
        "real = adapter_auto.open_backend\n"
        "def die(b, name, threads, provider):\n"
        "    if name == 'kernels-cpu': os.kill(os.getpid(), signal.SIGILL)\n"
        "    return real(b, name, threads, provider)\n"
        "adapter_auto.open_backend = die\n"
        f"open_adapter(load_bundle({str(folder)!r}), 'auto')\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert child.returncode < 0, child.stderr
    rival()
    opened = open_adapter(bundle, "auto")
    assert opened.name == "onnx"
    assert "a former run ended" in opened.choice


def test_auto_leaves_a_measurement_of_another_process_alone(
    rival: Callable[..., type[Rival]], bundle: Bundle
) -> None:
    rival()
    open_adapter(bundle, "auto")
    (key,) = cache.read_json(adapter_auto.FILE)
    cache.write_json(adapter_auto.FILE, {key: {"trying": "kernels-cpu", "pid": os.getppid()}})
    opened = open_adapter(bundle, "auto")
    assert opened.name == "onnx"
    assert "another process" in opened.choice


def test_auto_with_a_winner_that_no_longer_starts(
    rival: Callable[..., type[Rival]], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival()
    assert open_adapter(bundle, "auto").name == "kernels-cpu"
    monkeypatch.setattr(adapter_auto, "open_backend", adapter.open_backend)
    monkeypatch.setitem(sys.modules, "mse_kernels", None)
    opened = open_adapter(bundle, "auto")
    assert opened.name == "onnx"
    assert "does not start now" in opened.choice


def test_auto_does_not_remember_what_is_missing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mse_kernels", None)
    opened = open_adapter(bundle, "auto")
    assert opened.name == "onnx"
    assert "mse-doctor" in opened.choice
    assert facts() == []


def test_auto_forgets_an_interrupted_measurement(
    rival: Callable[..., type[Rival]], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival()

    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapter_auto, "_time", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_adapter(bundle, "auto")
    assert facts() == []
    assert open_adapter(bundle, "auto").name == "kernels-cpu"


def test_auto_with_what_is_installed(bundle: Bundle) -> None:
    opened = open_adapter(bundle, "auto", threads=2)
    assert opened.name in RUNNABLE
    assert opened.choice.startswith(f"{opened.name}: ")
    assert close(opened(**inputs()), open_adapter(bundle, "numpy")(**inputs()))
