"""ONNX Runtime sessions as this package wants them: few threads, no spinning, no noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mse_runtime.errors import BundleError, UsageError

__all__ = ["Session"]


class Session:
    """One ONNX graph on the CPU.

    The session's threads sleep between calls: a feature extractor shares its few cores with the
    video decoder, and a spinning pool would take them away.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Load `path`; raise BundleError if it is missing or is not an ONNX graph."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UsageError(
                "ONNX Runtime is not installed, and features need it: "
                "`pip install 'mse-runtime[cpu]'` (or `[gpu]`)."
            ) from error
        if not path.is_file():
            raise BundleError(
                f"the model file {path} is missing: reinstall mse-runtime, or export the bundle "
                "again."
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = max(1, threads)
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise BundleError(
                f"{path.name} is not an ONNX graph this ONNX Runtime can run ({error}): "
                "export it again, or update onnxruntime."
            ) from error
        self.inputs: tuple[str, ...] = tuple(i.name for i in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())
        self.input_shapes: tuple[tuple[int | str | None, ...], ...] = tuple(
            tuple(i.shape) for i in self._session.get_inputs()
        )

    def __call__(self, *arrays: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Run the graph on `arrays` (in the order of `inputs`); the outputs in graph order."""
        feeds = dict(zip(self.inputs, arrays, strict=True))
        result: list[np.ndarray[Any, Any]] = self._session.run(None, feeds)
        return result
