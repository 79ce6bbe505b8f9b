"""What is fuzzed: for each target a call that takes the file's bytes.

The promise of every call: it returns, or raises an `MSEError`. Anything else (another exception,
death by signal, more than `SECONDS` or `MEGABYTES`) is a find.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from mse_runtime.backbone.file_checks import check_file, may_repack
from mse_runtime.batch.journal import Journal
from mse_runtime.batch.rows import Row, read_rows
from mse_runtime.bundle import FeatureInput, load_bundle, manifest
from mse_runtime.datasets.safe_pickle import load_pickle
from mse_runtime.errors import MSEError
from mse_runtime.features.normalise import prepare
from mse_runtime.features.npz import load_npz
from mse_runtime.gguf import Gguf
from mse_runtime.media import FrameReader, SoundReader, plan_window, probe
from mse_runtime.placement import plan
from mse_runtime.prompt import check_text
from mse_runtime.sizing import positions

__all__ = ["MEGABYTES", "SECONDS", "TARGETS", "Target"]

SECONDS, MEGABYTES = 5, 1000
_VOICE = FeatureInput("lld13/1", 13, 1000)
_FACE = FeatureInput("face167/1", 167, 1000)


@dataclass(frozen=True)
class Target:
    """`call(data, folder)`; the folder is the target's to use."""

    call: Callable[[bytes, Path], None]
    max_bytes: int = 1 << 16


def _gguf(data: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    with Gguf.open(path) as found:
        for info in found.tensors.values():
            assert 0 < info.offset <= info.offset + info.size <= found.size
        for name in list(found._arrays)[:20]:
            found.array(name)
            found.has_repeats(name)
        with suppress(MSEError):
            rows = found.rows([0, found.n_vocab - 1])
            assert rows.shape == (2, found.tensors["token_embd.weight"].shape[1])
        _ = found.arch, found.weight_type, found.head_dim
        check_file(found)
        may_repack(found)
        plan(found, program=0).rows()


def _manifest(data: bytes, folder: Path) -> None:
    (folder / manifest.MANIFEST).write_bytes(data)
    bundle = manifest.read(folder)
    assert manifest.parse(json.loads(json.dumps(bundle.to_dict()))) == bundle
    positions(bundle)
    for name in list(bundle.tasks)[:4]:
        task = bundle.tasks[name]
        assert task.labels or task.range
    load_bundle(folder)


def _features(data: bytes, folder: Path) -> None:
    path = folder / "features.npz"
    path.write_bytes(data if data[:2] == b"PK" else _archive(data))
    found = load_npz(path, audio_spec="lld13/1", face_spec="face167/1")
    json.dumps([found.warnings, found.info])
    for track, wanted in ((found.audio, _VOICE), (found.face, _FACE)):
        values, length = prepare(track, wanted)
        assert np.isfinite(values).all()
        assert 0 <= length <= max(len(values), 1)


def _archive(data: bytes) -> bytes:
    """`name=content` pieces as an .npz: damage that gets past the zip's own checksums."""
    out = BytesIO()
    with ZipFile(out, "w") as archive:
        for piece in data.split(b"\xff|\xff")[:12]:
            name, _, content = piece.partition(b"=")
            text = name[:40].decode("latin1").replace("\0", "0")  # where the zip ends a name
            archive.writestr(f"{text}.npy", content)
    return out.getvalue()


def _rows(data: bytes, folder: Path) -> None:
    kinds = {b"t": ".tsv", b"j": ".jsonl"}
    path = folder / f"list{kinds.get(data[:1], '.csv')}"
    path.write_bytes(data[1:])
    rows = read_rows(path)
    assert [row.index for row in rows] == list(range(len(rows)))
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    with Journal(out, rows[:50]) as journal:
        for row in rows[:50]:
            with suppress(MSEError):
                check_text(row.text)
            journal.write(
                {"index": row.index, "id": row.id, "clip": str(row.source), "text": row.text}
            )
    with Journal(out, rows[:50]) as journal:
        assert len(journal.done) == len(rows[:50])


def _journal(data: bytes, folder: Path) -> None:
    out = folder / "out.jsonl"
    out.write_bytes(data)
    rows = [Row(i, f"r{i}", Path("c.mp4"), f"text {i}") for i in range(3)]
    with Journal(out, rows, run="abc", retry=data[-1:] == b"\n"):
        pass


def _media(data: bytes, folder: Path) -> None:
    path = folder / "clip.bin"
    path.write_bytes(data)
    info = probe(path)
    window, _ = plan_window(info, None, None, 0.5)
    SoundReader(info, window).read()
    for _ in zip(range(3), FrameReader(info, window, 5.0), strict=False):
        pass


def _pickle(data: bytes, folder: Path) -> None:
    path = folder / "data.pkl"
    path.write_bytes(data)
    load_pickle(path)


def _planted(kind: str) -> Target:
    """A fault of every kind that must be found: the fuzzers' own test."""

    def call(data: bytes, _folder: Path) -> None:
        if len(data) <= 3:
            return
        if kind == "exception":
            raise ZeroDivisionError("planted")
        if kind == "time":
            time.sleep(2 * SECONDS)
        elif kind == "memory":
            kept = b"x" * (2 * MEGABYTES << 20)
            time.sleep(3)
            del kept
        else:
            os.kill(os.getpid(), signal.SIGSEGV)

    return Target(call)


TARGETS = {
    "gguf": Target(_gguf),
    "manifest": Target(_manifest),
    "features": Target(_features),
    "rows": Target(_rows, 1 << 12),
    "journal": Target(_journal, 1 << 12),
    "media": Target(_media),
    "pickle": Target(_pickle, 1 << 12),
    **{f"planted-{kind}": _planted(kind) for kind in ("exception", "time", "memory", "signal")},
}
