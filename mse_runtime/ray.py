"""The batch on many machines: `mse-run --batch` as one step of a Ray Data pipeline.

    import ray
    from mse_runtime.ray import predict

    clips = ray.data.read_csv("/share/clips.csv")  # id, clip, text
    predict(clips, "/share/my-bundle", num_cpus=4).write_parquet("/share/answers")

Ray moves the rows, restarts what dies and repeats its rows; here is only what one of its workers
does. See docs/batches.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mse_runtime.analyzer import Analyzer, Parity
from mse_runtime.batch.export import PLAIN
from mse_runtime.batch.rows import COLUMNS, make_row
from mse_runtime.batch.run import answers
from mse_runtime.batch.together import GroupSize
from mse_runtime.bundle import load_bundle, manifest
from mse_runtime.bundle.hub import builtin_bundles, resolve_bundle
from mse_runtime.errors import UsageError
from mse_runtime.features.pool import FeaturePool
from mse_runtime.sizing import default_threads

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["predict"]

RETRIES = 3
"""Times the rows of a worker that died are tried again, before they are taken to be the cause."""
NUMBERS = ("value", "mode", "std")
NAMES = (*(name for name in PLAIN if name != "index"), "error", "result")


def predict(
    dataset: Dataset,
    bundle: str | Path = "tiny",
    *,
    task: str | None = None,
    parity: Parity | None = None,
    fps: float | None = None,
    max_seconds: float = 60.0,
    workers: int | None = None,
    num_cpus: int = 1,
    num_gpus: float = 0,
    batch_size: int = 16,
    folder: str | Path = ".",
    clip_timeout: float = 120.0,
    clip_memory: int = 2048,
) -> Dataset:
    """Answer every row of `dataset`: one row each, lazily, in Ray's order.

    The rows have the columns of a batch list: `id`, `text`, and `clip` or `features`; `task`,
    `start` and `end` where wanted. Relative paths start at `folder`, which like every path here
    must be the same on all machines. `bundle` is a built-in name, a folder, or a repository on
    the hub, which each machine fetches once, all the same commit.

    workers: processes that hold a bundle; None lets Ray start as many as there is work and room
    for. num_cpus: of each, for threads of the language model and processes for features.
    num_gpus: of each; without one the language model stays on the CPU. batch_size: rows a call.
    clip_timeout, clip_memory: seconds and MiB that the features of one clip may take.

    The columns of the answer: `id`, `clip`, `text`, `task`, `value`, `label`, `mode`, `std`,
    `error` (a message where there is no answer, else null), and `result`, the JSON document that
    `mse-run --batch` would write.

    Raises:
        UsageError: Ray is not installed, columns or the task are missing, or a count is none.
        BundleError: a bundle that is missing or damaged.
    """
    for name, count in (("workers", workers), ("num_cpus", num_cpus), ("batch_size", batch_size)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UsageError(f"{name} must be a whole number of at least 1, not {count!r}.")
    try:
        from ray.data import ActorPoolStrategy
    except ImportError:
        raise UsageError("This needs Ray Data: pip install 'mse-runtime[ray]'.") from None
    _check_columns(dataset.columns())
    place = _everywhere(bundle)
    known = manifest.read(resolve_bundle(place)).tasks
    if task is not None and task not in known:
        raise UsageError(
            f"The bundle {str(bundle)!r} has no task {task!r}. Its tasks are: {', '.join(known)}."
        )
    return dataset.map_batches(
        _Worker,
        fn_constructor_kwargs={
            "bundle": place,
            "num_cpus": num_cpus,
            "gpu": num_gpus > 0,
            "folder": Path(folder).absolute(),
            "clip_timeout": clip_timeout,
            "clip_memory": clip_memory,
            "options": {"task": task, "parity": parity, "fps": fps, "max_seconds": max_seconds},
        },
        compute=ActorPoolStrategy(size=workers) if workers else ActorPoolStrategy(min_size=1),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_task_retries=RETRIES,
    )


def _check_columns(names: Iterable[str] | None) -> None:
    """Before any work: a list without its columns would be nothing but errors."""
    found = set(names or ())
    if found and not ({"id", "text"} <= found and {"clip", "features"} & found):
        raise UsageError(
            "The dataset needs the columns id, text, and clip or features; it has "
            f"{', '.join(sorted(found))}."
        )


def _everywhere(bundle: str | Path) -> str:
    """The name under which every machine finds the very same bundle."""
    name = str(bundle)
    if name in builtin_bundles():
        return name
    place = resolve_bundle(name)
    if Path(name).expanduser().exists():
        return str(place.absolute())
    return f"{name.partition('@')[0]}@{place.name}"  # by commit: a branch may move on meanwhile


class _Worker:
    """One process of the pool: a loaded bundle and processes for features."""

    def __init__(
        self,
        *,
        bundle: str,
        num_cpus: int,
        gpu: bool,
        folder: Path,
        clip_timeout: float,
        clip_memory: int,
        options: dict[str, Any],
    ) -> None:
        loaded = load_bundle(resolve_bundle(bundle, progress=False), progress=False)
        # Ray gives so many CPUs; the machine's other cores belong to the other workers.
        threads = default_threads(loaded) or num_cpus
        self._analyzer = Analyzer(loaded, threads=threads, n_gpu_layers=None if gpu else 0)
        self._analyzer.ready()
        self._pool = FeaturePool(max(1, num_cpus // 2), clip_timeout, clip_memory)
        self._size = GroupSize(self._analyzer)  # goes on measuring from block to block
        self._folder, self._options = folder, options

    def __call__(self, table: Any) -> Any:
        """Arrow in, Arrow out, row by row."""
        import pyarrow

        rows = []
        for index, entry in enumerate(table.to_pylist()):
            fields = {k: v for k in COLUMNS if (v := entry.get(k)) not in (None, "")}
            row = make_row(index, fields, self._folder)
            rows.append(row if "id" in fields else replace(row, id=""))
        groups = answers(self._analyzer, rows, self._pool, size=self._size, **self._options)
        found = [_record(entry) for entries in groups for entry in entries]
        kinds = [(n, pyarrow.float64() if n in NUMBERS else pyarrow.string()) for n in NAMES]
        return pyarrow.Table.from_pylist(found, schema=pyarrow.schema(kinds))


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of `mse-run --batch` as a row; its index means nothing among many machines."""
    line = {name: value for name, value in entry.items() if name != "index"}
    error = entry["error"]["message"] if "error" in entry else None
    return {name: entry.get(name) for name in NAMES} | {
        "error": error,
        "result": json.dumps(line, ensure_ascii=False, allow_nan=False),
    }
