"""Data sets for training and evaluation.

Three forms are read: the published pickles (`published`), an open format of a CSV manifest with one
`.npz` or clip per row, and a single `.npz` (`open_format`; both in docs/data.md).
"""

from __future__ import annotations

from pathlib import Path

from mse_runtime.datasets import open_format, published
from mse_runtime.datasets.samples import (
    PUBLISHED,
    SPLITS,
    DataSet,
    DataSetInfo,
    Problem,
    Sample,
    assign_split,
    check_samples,
    held_features,
    parse_label,
    split_name,
    summary,
)
from mse_runtime.errors import MediaError

__all__ = [
    "PUBLISHED",
    "SPLITS",
    "DataSet",
    "DataSetInfo",
    "Problem",
    "Sample",
    "assign_split",
    "check_samples",
    "held_features",
    "load_dataset",
    "parse_label",
    "split_name",
    "summary",
]


def load_dataset(path: str | Path, name: str | None = None) -> DataSet:
    """The data set at `path`: a pickle, a folder of pickles, a folder with `manifest.csv`, a CSV or
    an `.npz`.

    `name` is one of `PUBLISHED` for the published pickles (otherwise told from the feature widths)
    and free for one's own. Raises MediaError for what cannot be read at all.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise MediaError(
            f"There is no data set at {path}. Give a published pickle, a folder of them, or a "
            "folder made by: mse-train prepare clips.csv -o data/"
        )
    if path.is_dir():
        if (path / open_format.MANIFEST).exists():
            return open_format.read_manifest(path / open_format.MANIFEST, name)
        if any(path.glob("*.pkl")):
            return published.read_folder(path, name)
    elif path.suffix in (".pkl", ".pickle"):
        return published.read_file(path, name)
    elif path.suffix == ".csv":
        return open_format.read_manifest(path, name)
    elif path.suffix == ".npz":
        return open_format.read_npz(path, name)
    raise MediaError(
        f"{path} is no data set: expected .pkl, .csv, .npz, or a folder with "
        f"{open_format.MANIFEST} or *.pkl (docs/data.md)."
    )
