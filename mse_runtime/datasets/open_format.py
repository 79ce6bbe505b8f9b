"""The open data format: a CSV manifest with one `.npz` or clip per row, or one single `.npz`.

Described for people in docs/data.md. `dataset.json` beside the manifest holds what a CSV cannot
say: the task, its classes or range, and the feature specs.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mse_runtime import memory
from mse_runtime.datasets.samples import (
    DataSet,
    DataSetInfo,
    Kind,
    Problem,
    Sample,
    assign_split,
    held_features,
    parse_label,
    split_name,
)
from mse_runtime.errors import MediaError
from mse_runtime.features.npz import MAX_BYTES, UNREADABLE, read_arrays

__all__ = ["INFO", "MANIFEST", "guess_info", "read_info", "read_manifest", "read_npz", "read_rows"]

MANIFEST = "manifest.csv"
INFO = "dataset.json"
SCHEMA = "mse-dataset/1"
DEFAULT_SPECS = ("lld13/1", "face167/1")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) for each row of a CSV with a header; blank lines are skipped.

    Raises MediaError for a file that is no UTF-8 CSV with the columns text and clip or features.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, skipinitialspace=True)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            if "text" not in columns or not {"clip", "features"} & set(columns):
                raise MediaError(
                    f"{path} needs a header line with the columns text and clip (or features), and "
                    f"label for training; it has: {', '.join(columns) or 'nothing'}."
                )
            reader.fieldnames = columns
            for row in reader:
                if any(row.values()):
                    yield reader.line_num, {k: (v or "").strip() for k, v in row.items() if k}
    except UnicodeDecodeError as error:
        raise MediaError(
            f"{path} is not UTF-8 (byte {error.start}). Save it as CSV UTF-8, or convert it: "
            f"iconv -f latin1 -t utf-8 {path.name}"
        ) from error
    except csv.Error as error:
        raise MediaError(f"{path} is no readable CSV ({error}).") from error
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror or error}.") from error


def guess_info(labels: Sequence[str], name: str, kind: Kind | None = None) -> DataSetInfo:
    """What a label column asks: numbers are a regression on -1..1 or -3..3, words are classes.

    Classes are sorted by name; a row without a label says nothing.
    """
    values = [label for label in labels if label]
    numbers = [number for label in values if (number := _number(label)) is not None]
    if kind == "regression" or (kind is None and values and len(numbers) == len(values)):
        top = 1.0 if max(map(abs, numbers), default=0.0) <= 1.0 else 3.0
        return DataSetInfo(name, "regression", *DEFAULT_SPECS, range=(-top, top))
    return DataSetInfo(name, "classification", *DEFAULT_SPECS, tuple(sorted(set(values))))


def read_info(path: Path, name: str | None = None) -> DataSetInfo:
    """`dataset.json`; MediaError names what is missing or wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise MediaError(
                f"{path} has schema {data.get('schema')!r}; this version reads {SCHEMA!r}."
            )
        if data["kind"] not in ("regression", "classification"):
            raise ValueError(f"kind {data['kind']!r}")
        ends = data.get("range")
        info = DataSetInfo(
            name=name or str(data["name"]),
            kind=data["kind"],
            audio_spec=str(data.get("audio_spec", DEFAULT_SPECS[0])),
            face_spec=str(data.get("face_spec", DEFAULT_SPECS[1])),
            labels=tuple(map(str, data.get("labels", ()))),
            range=(float(ends[0]), float(ends[1])) if ends else None,
        )
    except MediaError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise MediaError(
            f"{path} is no data set description ({type(error).__name__}: {error}). See "
            "docs/data.md, or make it again with mse-train prepare."
        ) from error
    if info.kind == "classification" and len(set(info.labels)) < 2:
        raise MediaError(f"{path}: a classification needs at least two distinct labels.")
    if info.kind == "regression" and (info.range is None or not info.range[0] < info.range[1]):
        raise MediaError(f"{path}: a regression needs a range such as [-3, 3].")
    return info


def write_info(path: Path, info: DataSetInfo) -> None:
    """Write `dataset.json` atomically."""
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "name": info.name,
        "kind": info.kind,
        "audio_spec": info.audio_spec,
        "face_spec": info.face_spec,
    }
    data |= {"labels": list(info.labels)} if info.labels else {"range": list(info.range or ())}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_manifest(path: Path, name: str | None = None) -> DataSet:
    """A CSV with the columns text, label, features or clip, and optionally id, split, speaker.

    Paths are relative to the CSV. Rows without a split are dealt out by a hash of the speaker, or
    else of the id.
    """
    rows = list(read_rows(path))
    described = path.parent / INFO
    if described.exists():
        info = read_info(described, name)
    else:
        own_name = path.resolve().parent.name if path.name == MANIFEST else path.stem
        info = guess_info([row.get("label", "") for _, row in rows], name or own_name)
    splits: dict[str, list[Sample]] = {}
    problems: list[Problem] = []
    seen: set[str] = set()
    for line, row in rows:
        where = f"{path.name}, line {line}"
        try:
            split, sample = _sample(row, path.parent, info, line)
            if sample.id in seen:
                raise ValueError(f"the id {sample.id!r} stands twice")
        except ValueError as error:
            problems.append(Problem(where, str(error)))
            continue
        seen.add(sample.id)
        splits.setdefault(split, []).append(sample)
    if not rows:
        raise MediaError(f"{path} has a header and no row.")
    return DataSet(info, {k: tuple(v) for k, v in splits.items()}, tuple(problems))


def _sample(row: dict[str, str], folder: Path, info: DataSetInfo, line: int) -> tuple[str, Sample]:
    file, clip = ((folder / row[key]) if row.get(key) else None for key in ("features", "clip"))
    source = file or clip
    if source is None:
        raise ValueError("names neither features nor clip")
    if not source.is_file():
        raise ValueError(f"there is no file {source}")
    if not row["text"]:
        raise ValueError("the text is empty")
    label = parse_label(row["label"], info) if row.get("label") else math.nan
    key = row.get("id") or f"{line:06d}-{source.stem}"
    split = (
        split_name(row["split"]) if row.get("split") else assign_split(row.get("speaker") or key)
    )
    return split, Sample(key, row["text"], label, clip=clip, file=file)


def read_npz(path: Path, name: str | None = None) -> DataSet:
    """One `.npz`: text [n], label [n], audio [n,Ta,da], video [n,Tv,dv], and optionally audio_len,
    video_len, id, split, speaker, and the scalars audio_spec, face_spec, labels [K], range [2].
    """
    try:
        data, _ = read_arrays(path, memory.available() or MAX_BYTES)
    except UNREADABLE as error:
        raise MediaError(
            f"{path} is no readable .npz of plain arrays that fit into memory "
            f"({type(error).__name__}: {error})."
        ) from error
    missing = [key for key in ("text", "audio", "video") if key not in data]
    if missing:
        raise MediaError(f"{path} lacks {', '.join(missing)} (docs/data.md).")
    count = len(data["text"])
    per_row = ("label", "audio", "video", "audio_len", "video_len", "id", "split", "speaker")
    for key in (key for key in per_row if key in data):
        if data[key].ndim == 0 or len(data[key]) != count:
            raise MediaError(f"{path}: {key!r} has {data[key].shape}, text has {count} rows.")
    for key in ("audio", "video"):
        if data[key].ndim != 3 or data[key].dtype.kind != "f":
            raise MediaError(f"{path}: {key!r} should be a float array [n, steps, columns].")
    info = _npz_info(data, name or path.stem)
    splits: dict[str, list[Sample]] = {}
    problems: list[Problem] = []
    for i in range(count):
        key = str(data["id"][i]) if "id" in data else f"{i:06d}"
        try:
            tracks = []
            for track in ("audio", "video"):
                values = data[track][i]
                length = int(data[f"{track}_len"][i]) if f"{track}_len" in data else len(values)
                if not 0 <= length <= len(values):
                    raise ValueError(f"{track}_len is {length} with {len(values)} steps stored")
                tracks.append(values[:length])
            if not str(data["text"][i]).strip():
                raise ValueError("the text is empty")
            label = parse_label(data["label"][i], info) if "label" in data else math.nan
            owner = str(data["speaker"][i]) if "speaker" in data else key
            split = split_name(str(data["split"][i])) if "split" in data else assign_split(owner)
        except ValueError as error:
            problems.append(Problem(f"{path.name}, row {i} ({key})", str(error)))
            continue
        held = held_features(tracks[0], tracks[1], info.audio_spec, info.face_spec)
        sample = Sample(key, str(data["text"][i]), label, held=held)
        splits.setdefault(split, []).append(sample)
    return DataSet(info, {k: tuple(v) for k, v in splits.items()}, tuple(problems))


def _npz_info(data: dict[str, Any], name: str) -> DataSetInfo:
    guess = guess_info([str(value) for value in data.get("label", ())], name)
    audio, face = (
        str(data[key]) if key in data else default
        for key, default in zip(("audio_spec", "face_spec"), DEFAULT_SPECS, strict=True)
    )
    if "labels" in data:
        names = tuple(map(str, data["labels"]))
        return DataSetInfo(name, "classification", audio, face, names)
    if "range" in data:
        low, high = map(float, data["range"])
        return DataSetInfo(name, "regression", audio, face, range=(low, high))
    return DataSetInfo(name, guess.kind, audio, face, guess.labels, guess.range)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
