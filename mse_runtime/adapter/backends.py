"""The adapter: features and text embeddings in, pseudo tokens out, on one of several backends.

`onnx` (ONNX Runtime) is the default; `kernels-cpu` and `kernels-cuda` are this project's fused
kernels, `numpy` the plain reference; `auto` picks by a measurement on this machine and says why in
`choice`. All of them compute published-model spec, section 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mse_runtime.bundle import AdapterInfo, Bundle, MismatchError
from mse_runtime.errors import BundleError, DeviceError, UsageError

__all__ = [
    "Adapter",
    "AdapterInputError",
    "Backend",
    "KernelAdapter",
    "NumpyAdapter",
    "OnnxAdapter",
    "Provider",
    "check_inputs",
    "open_backend",
]

Backend = Literal["auto", "onnx", "kernels-cpu", "kernels-cuda", "numpy"]
Provider = Literal["cpu", "cuda"]
Rows = NDArray[np.float32]
Lengths = NDArray[np.int64]
Inputs = tuple[Rows, Lengths, Rows, Lengths, Rows, Lengths]

INPUT_NAMES = ("audio", "audio_len", "video", "video_len", "text", "text_len")


class AdapterInputError(UsageError):
    """Arrays that the adapter cannot take: a wrong shape, type or length, or a value not finite."""


class Adapter(Protocol):
    """An opened adapter. `choice` says which backend runs and why."""

    name: str
    choice: str
    n_pseudo: int
    n_embd: int

    def __call__(
        self,
        audio: Rows,
        audio_len: Lengths,
        video: Rows,
        video_len: Lengths,
        text: Rows,
        text_len: Lengths,
    ) -> Rows:
        """Pseudo tokens float32 [B, P, D].

        audio [B, Ta, da], video [B, Tv, dv], text [B, Tt, D] are float32; only the first `*_len`
        rows of each sample count, whatever lies behind. A length of 0 stands for a missing
        modality. Raises `AdapterInputError`.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; the adapter cannot be called afterwards."""
        ...


class _Checked:
    """Shared by the backends: names and sizes, and the check of the inputs before `_run`."""

    def __init__(self, name: str, info: AdapterInfo) -> None:
        self.name = name
        self.choice = f"{name}: as asked"
        self.info = info
        self.n_pseudo = info.n_pseudo
        self.n_embd = info.n_embd

    def __call__(
        self,
        audio: Rows,
        audio_len: Lengths,
        video: Rows,
        video_len: Lengths,
        text: Rows,
        text_len: Lengths,
    ) -> Rows:
        inputs = check_inputs(self.info, audio, audio_len, video, video_len, text, text_len)
        return self._run(inputs)

    def close(self) -> None:
        pass

    def _run(self, inputs: Inputs) -> Rows:
        raise NotImplementedError


class OnnxAdapter(_Checked):
    """`adapter.onnx` on ONNX Runtime; exactly `threads` threads, which sleep between calls."""

    def __init__(
        self, path: Path, info: AdapterInfo, *, threads: int = 1, provider: Provider = "cpu"
    ) -> None:
        """Raises `BundleError` for a graph that is not this adapter, `DeviceError` for CUDA."""
        super().__init__("onnx" if provider == "cpu" else "onnx-cuda", info)
        self._session = _open_session(path, threads, provider)
        _check_graph(self._session, path, info)

    def _run(self, inputs: Inputs) -> Rows:
        feed = dict(zip(INPUT_NAMES, inputs, strict=True))
        pseudo: Rows = self._session.run(["pseudo"], feed)[0]
        return pseudo

    def close(self) -> None:
        self._session = None


class NumpyAdapter(_Checked):
    """`adapter.safetensors` computed by the plain reference: slow, and the ground truth."""

    def __init__(self, weights: dict[str, NDArray[Any]], info: AdapterInfo) -> None:
        from mse_kernels import reference

        super().__init__("numpy", info)
        self._weights = {name: value.astype(np.float32) for name, value in weights.items()}
        self._forward = reference.forward

    def _run(self, inputs: Inputs) -> Rows:
        return np.asarray(self._forward(self._weights, *inputs)["pseudo"], dtype=np.float32)


class KernelAdapter(_Checked):
    """`adapter.safetensors` on a fused kernel of `mse_kernels`."""

    def __init__(
        self, name: str, weights: dict[str, NDArray[Any]], info: AdapterInfo, *, threads: int = 1
    ) -> None:
        """Raises `DeviceError` where the kernel cannot run here."""
        super().__init__(name, info)
        try:
            import mse_kernels

            self._kernel: Any = mse_kernels.open(name.removeprefix("kernels-"), weights, threads)
        except (ImportError, AttributeError, OSError, RuntimeError, ValueError) as error:
            raise DeviceError(
                f"The adapter backend {name} cannot be used here: {error}. Use --adapter onnx; "
                "mse-doctor shows what is missing."
            ) from error

    def _run(self, inputs: Inputs) -> Rows:
        return np.asarray(self._kernel(*inputs), dtype=np.float32)

    def close(self) -> None:
        self._kernel.close()


def open_backend(bundle: Bundle, backend: str, threads: int, provider: Provider) -> Adapter:
    """One named backend, opened."""
    if backend == "onnx":
        return OnnxAdapter(bundle.onnx_path(), bundle.adapter, threads=threads, provider=provider)
    if provider == "cuda" and backend != "kernels-cuda":
        raise DeviceError(
            f"The adapter backend {backend} runs on the CPU only, but the GPU was asked for. Use "
            "--adapter onnx or --adapter kernels-cuda."
        )
    from mse_runtime.adapter.weights import load_weights

    weights = load_weights(bundle)
    if backend == "numpy":
        return NumpyAdapter(weights, bundle.adapter)
    return KernelAdapter(backend, weights, bundle.adapter, threads=threads)


def kernel_reasons() -> dict[str, str | None]:
    """Every kernel backend with None where it can run, else the reason why not."""
    try:
        import mse_kernels

        return {f"kernels-{name}": reason for name, reason in mse_kernels.available().items()}
    except (ImportError, AttributeError, OSError) as error:
        return dict.fromkeys(("kernels-cpu", "kernels-cuda"), f"mse_kernels: {error}")


def check_inputs(
    info: AdapterInfo,
    audio: Any,
    audio_len: Any,
    video: Any,
    video_len: Any,
    text: Any,
    text_len: Any,
) -> Inputs:
    """The six inputs as contiguous float32 and int64 arrays; `AdapterInputError` where unfit."""
    batch: int | None = None
    checked: list[Any] = []
    for name, values, lengths, width in (
        ("audio", audio, audio_len, info.audio_dim),
        ("video", video, video_len, info.face_dim),
        ("text", text, text_len, info.n_embd),
    ):
        rows, counts = np.asarray(values), np.asarray(lengths)
        if rows.dtype != np.float32:
            raise AdapterInputError(f"The adapter's {name} must be float32, not {rows.dtype}.")
        if rows.ndim != 3 or rows.shape[2] != width or 0 in rows.shape:
            raise AdapterInputError(
                f"The adapter's {name} must have the shape [batch, steps, {width}], not "
                f"{list(rows.shape)}."
            )
        if batch is None:
            batch = rows.shape[0]
        if rows.shape[0] != batch or counts.shape != (batch,):
            raise AdapterInputError(
                f"The adapter's inputs must have one batch size: audio has {batch}, {name} "
                f"{rows.shape[0]}, and {name}_len the shape {list(counts.shape)}."
            )
        if counts.dtype.kind not in "iu":
            raise AdapterInputError(f"{name}_len must be whole numbers, not {counts.dtype}.")
        if counts.min() < 0 or counts.max() > rows.shape[1]:
            raise AdapterInputError(
                f"{name}_len must lie between 0 and the {rows.shape[1]} steps given, not "
                f"{int(counts.min())} to {int(counts.max())}."
            )
        for sample, count in zip(rows, counts, strict=True):
            if not np.isfinite(sample[: int(count)]).all():
                raise AdapterInputError(
                    f"The adapter's {name} contains NaN or infinite values. Clean the features "
                    "first (mse_runtime.features.normalise.prepare does)."
                )
        checked += [np.ascontiguousarray(rows), np.ascontiguousarray(counts, dtype=np.int64)]
    return tuple(checked)


def _open_session(path: Path, threads: int, provider: Provider) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        extra = "gpu" if provider == "cuda" else "cpu"
        raise DeviceError(
            f"The adapter needs ONNX Runtime, which cannot be imported ({error}). Install it: "
            f"pip install 'mse-runtime[{extra}]'"
        ) from error
    providers = ["CPUExecutionProvider"]
    if provider == "cuda":
        providers = ["CUDAExecutionProvider", *providers]
        if providers[0] not in onnxruntime.get_available_providers():
            raise DeviceError(
                "ONNX Runtime's CUDA provider was asked for, but the installed wheel has only "
                f"{', '.join(onnxruntime.get_available_providers())}. Install the other one: pip "
                "uninstall -y onnxruntime && pip install 'mse-runtime[gpu]'"
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    # Spinning threads would take the cores from the language model between two calls.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Files that the manifest does not name must not be pulled in as external tensor data: from
    # bytes, with a place that is no folder, ONNX Runtime refuses every such reference.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path)
    )
    try:
        model = path.read_bytes()
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise BundleError(
            f"{path} is no adapter that ONNX Runtime can load: {_first_line(error)}. Copy the "
            "bundle again, or export it again with mse-export."
        ) from error
    if provider == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise DeviceError(
            "ONNX Runtime has a CUDA provider, but it does not start on this machine (no NVIDIA "
            "driver, or CUDA and cuDNN libraries that are missing or of another version). See "
            "mse-doctor, or leave the adapter on the CPU."
        )
    return session


def _check_graph(session: Any, path: Path, info: AdapterInfo) -> None:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    widths = {"audio": info.audio_dim, "video": info.face_dim, "text": info.n_embd}
    if set(inputs) != set(INPUT_NAMES) or "pseudo" not in outputs:
        raise MismatchError(
            f"{path} is no MSE adapter: it takes {', '.join(sorted(inputs))} and gives "
            f"{', '.join(sorted(outputs))}. Export the bundle again with mse-export."
        )
    for name, width in widths.items():
        _check_axes(path, name, inputs[name].shape, [width])
    _check_axes(path, "pseudo", outputs["pseudo"].shape, [info.n_pseudo, info.n_embd])


def _check_axes(path: Path, name: str, shape: list[Any], last: list[int]) -> None:
    if len(shape) != 3 or shape[-len(last) :] != last:
        raise MismatchError(
            f"{path}: {name} has the shape {shape}, but the manifest says it ends in {last}. "
            "Export the bundle again with mse-export."
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
