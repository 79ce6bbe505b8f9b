"""The published data sets' pickles, through the restricted unpickler.

MOSEI and SIMS-v2: one dict of splits of arrays; MELD, CHERMA and IEMOCAP: one list per split of
`{"features": {text, audio, video, audio_len, video_len}, "label"}` (published-model spec,
section 9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.datasets.safe_pickle import load_pickle
from mse_runtime.datasets.samples import (
    PUBLISHED,
    SPLITS,
    DataSet,
    DataSetInfo,
    Problem,
    Sample,
    held_features,
    parse_label,
    split_name,
)
from mse_runtime.errors import MediaError, UsageError

__all__ = ["read_file", "read_folder"]

Array = NDArray[Any]


def read_file(path: Path, name: str | None = None) -> DataSet:
    """A dict-of-splits pickle, or a single list pickle (its split from its file name)."""
    content = load_pickle(path)
    if isinstance(content, Mapping):
        return _from_arrays(content, path, name)
    return _from_lists({_split_of(path): (path, content)}, name)


def read_folder(folder: Path, name: str | None = None) -> DataSet:
    """A folder of pickles: one dict of splits, or `*_train.pkl`, `*_valid.pkl`, `*_test.pkl`."""
    paths = sorted(folder.glob("*.pkl"))
    if len(paths) == 1:
        return read_file(paths[0], name)
    lists: dict[str, tuple[Path, Any]] = {}
    for path in paths:
        try:
            split = _split_of(path)
        except MediaError:
            continue
        if split in lists:
            raise MediaError(
                f"{folder} holds two pickles for the split {split!r} ({lists[split][0].name} and "
                f"{path.name}). Leave one data set per folder."
            )
        lists[split] = (path, load_pickle(path))
    if not lists:
        raise MediaError(
            f"{folder} holds no pickle named by its split; expected *_train.pkl, *_valid.pkl (or "
            "_dev) and *_test.pkl, or a single pickle with all splits."
        )
    return _from_lists(lists, name)


def _split_of(path: Path) -> str:
    try:
        return split_name(path.stem.rsplit("_", 1)[-1])
    except ValueError:
        raise MediaError(
            f"{path} holds a list, so its split must stand in its name: for example "
            "meld_train.pkl, meld_dev.pkl, meld_test.pkl."
        ) from None


def _info(name: str | None, audio_dim: int, face_dim: int, kind: str, where: Path) -> DataSetInfo:
    from mse_runtime.features.spec import get_spec

    def fits(info: DataSetInfo) -> bool:
        return (get_spec(info.audio_spec).dim, get_spec(info.face_spec).dim) == (
            audio_dim,
            face_dim,
        )

    if name is not None:
        if name not in PUBLISHED:
            raise UsageError(
                f"{name!r} is no published data set; known: {', '.join(PUBLISHED)}. Your own data "
                "goes in the open format (docs/data.md)."
            )
        info = PUBLISHED[name]
        if not fits(info):
            raise MediaError(
                f"{where} has feature widths ({audio_dim}, {face_dim}), which are not {name}'s "
                f"({get_spec(info.audio_spec).dim}, {get_spec(info.face_spec).dim})."
            )
        return info
    found = [info for info in PUBLISHED.values() if info.kind == kind and fits(info)]
    if len(found) != 1:
        names = ", ".join(info.name for info in found) or "none known"
        raise UsageError(
            f"{where} has feature widths ({audio_dim}, {face_dim}), which fit: {names}. Name the "
            f"data set, for example --dataset {found[0].name if found else 'mosei'}."
        )
    return found[0]


def _from_arrays(content: Mapping[Any, Any], path: Path, name: str | None) -> DataSet:
    tables = {split: content[split] for split in SPLITS if split in content}
    if not tables or not all(isinstance(table, Mapping) for table in tables.values()):
        raise MediaError(
            f"{path} is a dict without splits; expected the keys train, valid and test, each a "
            f"dict. It has: {', '.join(map(str, list(content)[:8]))}."
        )
    first = next(iter(tables.values()))
    audio, face = (_frames(first, key, path) for key in ("audio", "vision"))
    info = _info(name, audio.shape[2], face.shape[2], "regression", path)
    splits: dict[str, tuple[Sample, ...]] = {}
    problems: list[Problem] = []
    for split, table in tables.items():
        splits[split], bad = _rows(table, info, f"{path.name}, {split}", path)
        problems += bad
    return DataSet(info, splits, tuple(problems))


def _rows(
    table: Mapping[Any, Any], info: DataSetInfo, where: str, path: Path
) -> tuple[tuple[Sample, ...], list[Problem]]:
    audio, face = (_frames(table, key, path) for key in ("audio", "vision"))
    labels, texts = _column(table, "regression_labels", path), _column(table, "raw_text", path)
    count = len(texts)
    ids = table.get("id", [f"{i}" for i in range(count)])
    lengths = {
        key: table.get(f"{key}_lengths", np.full(count, array.shape[1]))
        for key, array in (("audio", audio), ("vision", face))
    }
    sizes = {len(x) for x in (audio, face, labels, texts, ids, *lengths.values())}
    if len(sizes) > 1:
        raise MediaError(
            f"{where}: the columns have different lengths ({sorted(sizes)}); the file is damaged."
        )
    samples: list[Sample] = []
    problems: list[Problem] = []
    for i in range(count):
        place = f"{where}, {_name(ids[i])}"
        try:
            held = held_features(
                audio[i, : _length(lengths["audio"][i], audio.shape[1])],
                face[i, : _length(lengths["vision"][i], face.shape[1])],
                info.audio_spec,
                info.face_spec,
            )
            label = parse_label(labels[i], info)
            samples.append(Sample(_name(ids[i]), _text(texts[i]), label, held=held))
        except ValueError as error:
            problems.append(Problem(place, str(error)))
    return tuple(samples), problems


def _from_lists(lists: Mapping[str, tuple[Path, Any]], name: str | None) -> DataSet:
    info: DataSetInfo | None = None
    splits: dict[str, tuple[Sample, ...]] = {}
    problems: list[Problem] = []
    for split in (s for s in SPLITS if s in lists):
        path, entries = lists[split]
        if not isinstance(entries, Sequence) or not len(entries):
            raise MediaError(f"{path} is no list of samples; expected what MELD's loader reads.")
        samples: list[Sample] = []
        for i, entry in enumerate(entries):
            place = f"{path.name}, sample {i}"
            if not isinstance(entry, Mapping) or not isinstance(entry.get("features"), Mapping):
                problems.append(Problem(place, "is no dict with `features` and `label`"))
                continue
            try:
                found = entry["features"]
                audio, face = _matrix(found, "audio"), _matrix(found, "video")
                info = info or _info(name, audio.shape[1], face.shape[1], "classification", path)
                held = held_features(
                    audio[: _length(found.get("audio_len", len(audio)), len(audio))],
                    face[: _length(found.get("video_len", len(face)), len(face))],
                    info.audio_spec,
                    info.face_spec,
                )
                label = parse_label(entry.get("label"), info)
                sample_id = _name(entry.get("id", f"{split}-{i}"))
                samples.append(Sample(sample_id, _text(found.get("text")), label, held=held))
            except ValueError as error:
                problems.append(Problem(place, str(error)))
        splits[split] = tuple(samples)
    if info is None:
        raise MediaError(
            "No sample could be read:\n" + "\n".join(f"  {problem}" for problem in problems[:5])
        )
    return DataSet(info, splits, tuple(problems))


def _frames(table: Mapping[Any, Any], key: str, path: Path) -> Array:
    array = np.asarray(_column(table, key, path))
    if array.ndim != 3 or array.dtype.kind != "f":
        raise MediaError(
            f"{path}: {key!r} should be a float array [samples, steps, columns]; it is "
            f"{array.dtype} {list(array.shape)}."
        )
    return array


def _column(table: Mapping[Any, Any], key: str, path: Path) -> Any:
    if key not in table:
        raise MediaError(
            f"{path}: a split has no {key!r}; it has {', '.join(map(str, list(table)[:12]))}. "
            "Expected the processed files of MOSEI or SIMS-v2."
        )
    return table[key]


def _matrix(found: Mapping[Any, Any], key: str) -> NDArray[np.float32]:
    try:
        array = np.asarray(found.get(key), np.float32)
    except (TypeError, ValueError):
        array = np.empty(0, np.float32)
    if array.ndim != 2:
        raise ValueError(f"{key!r} is no matrix [steps, columns]")
    return array


def _length(value: Any, steps: int) -> int:
    length = int(np.asarray(value).reshape(-1)[0])
    if not 0 <= length <= steps:
        raise ValueError(f"a length of {length} with {steps} steps stored")
    return length


def _text(value: Any) -> str:
    if isinstance(value, np.generic | np.ndarray):
        value = value.item() if value.size == 1 else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the text is {value!r}, which is no transcript")
    return value


def _name(value: Any) -> str:
    return str(value.item() if isinstance(value, np.generic) else value)
