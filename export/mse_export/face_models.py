"""Make the three face networks that ship in `mse_runtime/data/face` from MediaPipe's wheel.

    pip download --no-deps mediapipe==0.10.21
    pip install tflite ai-edge-litert onnx onnxruntime
    python -m mse_export.face_models mediapipe-0.10.21-*.whl -o mse_runtime/data/face

Reads the TFLite files out of the wheel (Apache-2.0), rewrites each as an ONNX graph (face_graph)
and compares both on random pictures: TFLite's own interpreter, packages of a developer's machine
only, against ONNX Runtime. A network that differs is not written.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_export.face_graph import to_onnx
from mse_export.face_tflite import read_tflite
from mse_runtime.errors import MSEError, UsageError

__all__ = ["NETWORKS", "FaceNetwork", "compare", "convert"]

RUNS = 8  # random pictures, the last two as one batch
TOLERANCE = 1e-5  # largest difference, in shares of the output's largest value


@dataclass(frozen=True)
class FaceNetwork:
    """A network's file in the wheel and the outputs that are kept."""

    name: str
    member: str
    outputs: tuple[str, ...]


NETWORKS = (
    FaceNetwork(
        "face_detection_short_range",
        "mediapipe/modules/face_detection/face_detection_short_range.tflite",
        ("regressors", "classificators"),
    ),
    FaceNetwork(
        "face_landmark",
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        ("conv2d_21", "conv2d_31"),  # 468 points, the logit of a face being there
    ),
    FaceNetwork(
        "iris_landmark",
        "mediapipe/modules/iris_landmark/iris_landmark.tflite",
        ("output_iris",),  # the eye's contour, its other output, is left out
    ),
)


def convert(tflite: bytes, outputs: tuple[str, ...]) -> Any:
    """The ONNX model (onnx.ModelProto) of a .tflite file's named outputs."""
    return to_onnx(read_tflite(tflite).only(outputs))


def compare(tflite: bytes, model: Any, *, seed: int = 0) -> float:
    """Largest difference between TFLite and ONNX Runtime, in shares of each output's peak."""
    try:
        lite = importlib.import_module("ai_edge_litert.interpreter")
    except ImportError as error:
        raise UsageError(
            "the comparison needs TFLite's interpreter: `pip install ai-edge-litert`."
        ) from error
    import onnxruntime

    interpreter = lite.Interpreter(model_content=tflite, num_threads=1)
    interpreter.allocate_tensors()
    port = interpreter.get_input_details()[0]
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    pictures = np.random.default_rng(seed).random((RUNS, *port["shape"][1:]), dtype=np.float32)
    worst = 0.0
    for start in range(RUNS):
        interpreter.set_tensor(port["index"], pictures[start : start + 1])
        interpreter.invoke()
        theirs = {
            detail["name"]: interpreter.get_tensor(detail["index"])
            for detail in interpreter.get_output_details()
        }
        # the last two run as a batch, so that a wrong batch dimension shows
        batch = pictures[-2:] if start >= RUNS - 2 else pictures[start : start + 1]
        ours = session.run(names, {session.get_inputs()[0].name: batch})
        row = start - (RUNS - 2) if len(batch) == 2 else 0
        for name, value in zip(names, ours, strict=True):
            worst = max(worst, _difference(value[row], theirs[name][0]))
    return worst


def _difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(1e-6, np.abs(theirs).max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="mediapipe-0.10.21-....whl")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    arguments = parser.parse_args()
    try:
        _run(arguments.wheel, arguments.output)
    except MSEError as error:
        print(f"face_models: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _run(wheel: Path, folder: Path) -> None:
    import onnx

    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{wheel} is not a wheel ({error}): `pip download --no-deps mediapipe==0.10.21`."
        ) from error
    with archive:
        for network in NETWORKS:
            try:
                tflite = archive.read(network.member)
            except KeyError:
                raise UsageError(
                    f"{wheel.name} has no {network.member}: mediapipe from 0.10.35 on carries no "
                    "networks; take 0.10.21."
                ) from None
            model = convert(tflite, network.outputs)
            worst = compare(tflite, model)
            print(f"{network.name}: differs by {worst:.1e} of the peak", file=sys.stderr)
            if worst > TOLERANCE:
                raise UsageError(
                    f"{network.name} differs from TFLite by more than {TOLERANCE:g}: not written."
                )
            onnx.save(model, folder / f"{network.name}.onnx")


if __name__ == "__main__":
    main()
