"""Feature files (.npz): written whole, read with every size checked before memory is taken.

Arrays: `audio` [Ta, da], `video` [Tv, dv] and for each of them `_valid`, `_times`, `_spec`;
`duration`; `warnings` and `info` as JSON text. A plain file with only `audio` and `video` is
accepted: all rows valid, times unknown, spec unnamed.
"""

from __future__ import annotations

import json
import math
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mse_runtime.errors import MediaError
from mse_runtime.features.spec import Features, FeatureTrack

__all__ = ["MAX_BYTES", "UNREADABLE", "load_npz", "read_arrays", "save_npz", "write_npz"]

MAX_BYTES = 256 * 2**20
"""Most that all arrays together may declare: hours of features. More is refused."""
MAX_DIM = 65_536
UNREADABLE = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,  # encrypted, or a compression this Python lacks
    MemoryError,
)
_NAMES = {"audio": "audio", "face": "video"}


def save_npz(path: str | Path, features: Features) -> None:
    """Write features; the file appears whole or not at all.

    Raises:
        MediaError: the folder is missing or cannot be written.
    """
    target = Path(path)
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as handle:
            part = Path(handle.name)
            try:
                write_npz(handle, features)
            except BaseException:
                part.unlink()
                raise
        part.chmod(0o644)
        part.replace(target)
    except OSError as error:
        raise MediaError(
            f"cannot write {path}: {error.strerror or error}. Name a file in a folder that exists."
        ) from error


def write_npz(handle: IO[bytes], features: Features, *, compress: bool = True) -> None:
    """Write features to an open file."""
    arrays: dict[str, NDArray[Any]] = {"duration": np.float64(features.duration)}  # type: ignore[dict-item]
    for modality, name in _NAMES.items():
        track: FeatureTrack | None = getattr(features, modality)
        if track is not None:
            arrays[name] = track.values
            arrays[f"{name}_valid"] = track.valid
            arrays[f"{name}_times"] = track.times
            arrays[f"{name}_spec"] = np.array(track.spec)
    arrays["warnings"] = np.array(json.dumps(features.warnings))
    arrays["info"] = np.array(json.dumps(_plain(features.info)))
    write: Any = np.savez_compressed if compress else np.savez
    write(handle, **arrays)


def load_npz(
    path: str | Path | IO[bytes],
    *,
    audio_spec: str | None = None,
    face_spec: str | None = None,
    masked: bool = False,
) -> Features:
    """Read a feature file.

    Args:
        path: an .npz made by `save_npz`, or one with plain `audio` and/or `video` matrices; or
            such a file open for reading.
        audio_spec, face_spec: ids for a plain file that doesn't name them.
        masked: also one without a track, of a clip of which nothing could be used.

    Raises:
        MediaError: missing, not an .npz, damaged, pickled objects, a size over the limit, or
            arrays that don't belong together.
    """
    try:
        arrays, found = read_arrays(path, MAX_BYTES, _KNOWN)
    except FileNotFoundError as error:
        raise MediaError(f"There is no feature file {path}. Check the path.") from error
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(
            f"{path} is not a feature file that can be read: {reason}. Expected an .npz with "
            "`audio` [T, d] and/or `video` [T, d]; write one with mse-run --features-only."
        ) from error
    if not masked and "audio" not in arrays and "video" not in arrays:
        raise MediaError(
            f"{path} holds neither `audio` nor `video`, but {', '.join(found[:10]) or 'nothing'}. "
            "Save at least one matrix [T, d] under one of these names."
        )
    try:
        audio = _track(arrays, "audio", audio_spec)
        face = _track(arrays, "video", face_spec)
        duration = float(arrays["duration"]) if "duration" in arrays else math.nan
        warnings = tuple(str(w) for w in json.loads(str(arrays.get("warnings", "[]"))))
        info = json.loads(str(arrays.get("info", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise MediaError(f"{path}: {error}. Write it again.") from error
    return Features(audio, face, duration, warnings, info if isinstance(info, dict) else {})


_KNOWN = {
    *(name + tail for name in ("audio", "video") for tail in ("", "_valid", "_times", "_spec")),
    "duration",
    "warnings",
    "info",
}


def read_arrays(
    path: str | Path | IO[bytes], limit: int, known: set[str] | None = None
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The arrays called `known` (None: all), and the names of all that there are.

    Together they may declare `limit` bytes. Raises one of `UNREADABLE`.
    """
    if isinstance(path, str | Path) and Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is no regular file")  # a pipe would be waited for
    with zipfile.ZipFile(path) as archive:
        stored = {name.removesuffix(".npy"): name for name in archive.namelist()}
        wanted = [key for key in sorted(stored) if known is None or key in known]
        size = sum(archive.getinfo(stored[key]).file_size for key in wanted)
        if size > limit:
            raise ValueError(f"it declares {size / 2**20:.0f} MB, over {limit >> 20} MB")
        return {key: _read(archive, stored[key]) for key in wanted}, sorted(stored)


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array. numpy would believe the header's shape and take the memory first."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as handle:
        shape, fortran, dtype = _header(handle)
        if dtype.hasobject:
            raise ValueError(f"`{name}` holds pickled objects, which are never loaded")
        count = math.prod(shape)
        data = handle.read(min(count * dtype.itemsize, size) + 1)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"`{name}` holds {len(data)} bytes where {shape} {dtype} is declared")
    array = np.frombuffer(data, dtype, count) if dtype.itemsize else np.zeros(count, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _header(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(handle)
    if version != (1, 0):  # the later ones are for headers over 64 KiB, which no matrix has
        raise ValueError(f"npy version {version} is not supported")
    return npy.read_array_header_1_0(handle)


def _track(arrays: dict[str, NDArray[Any]], name: str, given: str | None) -> FeatureTrack | None:
    if name not in arrays:
        return None
    raw = arrays[name]
    if raw.ndim != 2 or raw.dtype.kind not in "fiu" or not 0 < raw.shape[1] <= MAX_DIM:
        raise ValueError(
            f"`{name}` must be a matrix [T, d] of numbers, not {raw.dtype} {raw.shape}"
        )
    rows = len(raw)
    valid = arrays.get(f"{name}_valid", np.ones(rows, np.bool_))
    times = arrays.get(f"{name}_times", np.full(rows, np.nan))
    if valid.shape != (rows,) or times.shape != (rows,):
        raise ValueError(f"`{name}_valid` and `{name}_times` must have the {rows} rows of `{name}`")
    spec = str(arrays.get(f"{name}_spec", given or ""))
    # Values beyond float32 become infinities on purpose: the bundle decides about those.
    with np.errstate(over="ignore"):
        values = raw.astype(np.float32)
    return FeatureTrack(spec, values, valid.astype(np.bool_), times.astype(np.float64))


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold; pictures and meshes stay out."""
    kept = {}
    for key, value in info.items():
        try:
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return kept
