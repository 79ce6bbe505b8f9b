"""ONNX Runtime sessions as this package wants them: few threads, no spinning, no noise.

Optimising a graph takes longer than loading the outcome, so that of the package's own small ones is
kept in the cache folder, for this ONNX Runtime and this processor.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mse_runtime import cpu
from mse_runtime.cache import cache_dir
from mse_runtime.errors import BundleError, UsageError

__all__ = ["Session"]

FOLDER, KEEP, PART = "graphs", 12, "part-"
_SUM = 4  # bytes of the checksum before a kept graph
_LONG = 3600  # seconds that none takes to be written


class Session:
    """One ONNX graph on the CPU.

    The session's threads sleep between calls: a feature extractor shares its few cores with the
    video decoder, and a spinning pool would take them away.
    """

    def __init__(self, path: Path, *, threads: int = 1, keep: bool = False) -> None:
        """Load `path`; raise BundleError if it is missing or is not an ONNX graph.

        keep: the optimised graph, for the next time.
        """
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
        try:
            self._session = _kept(ort, path, threads) if keep else _load(ort, path, threads)
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


def _load(ort: Any, graph: Path | bytes, threads: int, **more: Any) -> Any:
    """more: what else is set in the session's options."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = max(1, threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in more.items():
        setattr(options, name, value)
    source = graph if isinstance(graph, bytes) else str(graph)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _kept(ort: Any, path: Path, threads: int) -> Any:
    """A session of the kept graph, or of `path`, whose optimised graph is kept from then on."""
    place = _place(ort, path)
    if graph := _read(place):
        as_it_is = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return _load(ort, graph, threads, graph_optimization_level=as_it_is)
        except Exception:  # this one cannot: it is made anew
            pass
    try:  # a folder that cannot be written costs time, nothing else
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=PART) as folder:
            made = Path(folder) / "graph.onnx"
            session = _load(ort, path, threads, optimized_model_filepath=str(made))
            _write(made.read_bytes(), Path(folder) / "kept", place)
            return session
    except Exception:  # no folder, no space left, or no graph: that is told below
        return _load(ort, path, threads)


def _place(ort: Any, path: Path) -> Path:
    stat = path.stat()
    facts = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, ort.__version__, cpu.model())
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return cache_dir() / FOLDER / f"{name}.onnx"


def _read(place: Path) -> bytes:
    """The kept graph; none where there is none, or a damaged one."""
    try:
        kept = place.read_bytes()
    except OSError:
        return b""
    graph = kept[_SUM:]
    return graph if kept[:_SUM] == _sum(place, graph) else b""


def _sum(place: Path, graph: bytes) -> bytes:
    """A checksum of the graph and of what it is kept as."""
    return zlib.crc32(graph, zlib.crc32(place.name.encode())).to_bytes(_SUM, "little")


def _write(graph: bytes, part: Path, place: Path) -> None:
    part.write_bytes(_sum(place, graph) + graph)
    part.replace(place)
    kept = sorted(place.parent.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
    for old in kept[:-KEEP]:
        old.unlink()
    for left in place.parent.glob(f"{PART}*"):  # of processes that were ended meanwhile
        if left.stat().st_mtime < time.time() - _LONG:
            shutil.rmtree(left, ignore_errors=True)
