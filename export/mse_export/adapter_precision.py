"""Adapter weights in fp32, fp16 and int8, side by side: size, error and time.

    python -m mse_export.adapter_precision BUNDLE

int8 is optimum's dynamic quantisation under ONNX Runtime. It saves megabytes beside a language
model of gigabytes and milliseconds beside its prefill, at an error that leaves the golden sets'
bound by orders of magnitude; bundles therefore carry fp32, or fp16 on request.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_export import onnx_graph
from mse_export.quiet import quiet
from mse_runtime.bundle import Bundle

__all__ = ["Measured", "compare"]

ROUNDS = 20


@dataclass(frozen=True)
class Measured:
    """One variant of the adapter."""

    name: str
    size: int
    """Bytes of the ONNX file."""
    error: float
    """Largest difference from PyTorch, relative to the largest output."""
    milliseconds: float
    """Median time of one clip of full length, one thread."""


def compare(bundle: Bundle) -> list[Measured]:
    """fp32, fp16 and int8 variants of a bundle's adapter on inputs of its own shapes."""
    import torch

    from mse_export.adapter import adapter_from_state
    from mse_export.checkpoint import read_checkpoint
    from mse_export.verify import adapter_inputs

    state = read_checkpoint(bundle.weights_path()).state
    inputs = adapter_inputs(bundle)
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = adapter_from_state(state)(**tensors).numpy()
    with tempfile.TemporaryDirectory(prefix="mse-precision-") as scratch:
        folder = Path(scratch)
        for precision in ("fp32", "fp16"):
            path = folder / f"{precision}.onnx"
            onnx_graph.save(onnx_graph.optimise(onnx_graph.build(state, precision)), path)
        quantised = _int8(folder / "fp32.onnx", folder / "int8")
        variants = {"fp32": folder / "fp32.onnx", "fp16": folder / "fp16.onnx", "int8": quantised}
        return [_measure(name, path, inputs, expected) for name, path in variants.items()]


def _int8(path: Path, target: Path) -> Path:
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    with quiet():
        quantizer = ORTQuantizer.from_pretrained(path.parent, file_name=path.name)
        config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer.quantize(save_dir=target, quantization_config=config)
    return next(target.glob("*.onnx"))


def _measure(
    name: str, path: Path, inputs: Mapping[str, NDArray[Any]], expected: NDArray[np.float32]
) -> Measured:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["pseudo"], dict(inputs))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    one = {key: value[:1] for key, value in inputs.items()}
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        session.run(["pseudo"], one)
        times.append(time.perf_counter() - start)
    return Measured(name, path.stat().st_size, error, float(np.median(times)) * 1e3)


def main() -> None:
    """Print the table for a bundle (a name, folder or repository)."""
    from mse_runtime.bundle import load_bundle
    from mse_runtime.bundle.hub import resolve_bundle

    bundle = load_bundle(resolve_bundle(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
    print(f"{'weights':8} {'bytes':>12} {'relative error':>15} {'ms / clip':>10}")
    for row in compare(bundle):
        print(f"{row.name:8} {row.size:>12,} {row.error:>15.1e} {row.milliseconds:>10.2f}")


if __name__ == "__main__":
    main()
