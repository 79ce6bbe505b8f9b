"""The synthetic clips: which there are, and their features by the runtime's own extractors.

A clip is drawn and spoken in memory and goes straight into `FaceExtractor` and `lld13`, as a
decoded file would. Rendered features are kept in shards, so a killed run goes on where it was.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_export.training.tiny.actors import Clip, Painter, frames, make_actor, perform, write_mp4
from mse_export.training.tiny.grammar import clip_sentence
from mse_export.training.tiny.voice import HELD_OUT_VOICES, TRAINING_VOICES
from mse_export.training.tiny.world import Media, draw_media, fused_emotion, fused_sentiment
from mse_runtime.errors import UsageError

__all__ = ["ClipSpec", "Rendered", "act", "load", "plan", "render_all", "write_all"]

_LOG = logging.getLogger(__name__)
_SHARD = 40
#: Frames are this many pixels square in the bulk of the data; examples and tests are larger.
SIZE, FPS = 200, 5.0


@dataclass(frozen=True)
class ClipSpec:
    """Everything that determines a clip, and its labels."""

    name: str
    identity: int
    text: str
    text_valence: float
    text_emotion: int | None
    media: Media
    seed: int
    held_out: bool
    """Whether the voice is one of those never trained on."""
    strength: float = 1.0
    """How strongly the face shows what the label says it feels."""

    @property
    def sentiment(self) -> float:
        """The label on -3..+3."""
        return fused_sentiment(self.text_valence, self.media)

    @property
    def emotion(self) -> int | None:
        """The label's index, or None where the words carry no single emotion."""
        if self.text_emotion is None:
            return None
        return fused_emotion(self.text_emotion, self.text_valence, self.media)


@dataclass(frozen=True)
class Rendered:
    """Raw features of a clip."""

    spec: ClipSpec
    audio: NDArray[np.float32]
    """[Ta, 13]."""
    face: NDArray[np.float32]
    """[Tv, 167]."""
    face_valid: NDArray[np.bool_]


def plan(
    split: str,
    identities: int,
    each: int,
    *,
    seed: int,
    held_out: bool = False,
    avoid: frozenset[str] = frozenset(),
) -> list[ClipSpec]:
    """`identities` people saying `each` sentences; texts in `avoid` and repeats are left out."""
    rng = random.Random(seed)
    seen = set(avoid)
    out = []
    for person in range(identities):
        for k in range(each):
            sentence = clip_sentence(rng)
            while sentence.text in seen:
                sentence = clip_sentence(rng)
            seen.add(sentence.text)
            out.append(
                ClipSpec(
                    name=f"{split}-{person:04d}-{k}",
                    identity=seed * 100_000 + person,
                    text=sentence.text,
                    text_valence=sentence.valence,
                    text_emotion=sentence.emotion,
                    media=draw_media(rng, sentence.valence, sentence.emotion),
                    seed=rng.randrange(1 << 30),
                    held_out=held_out,
                )
            )
    return out


def act(spec: ClipSpec) -> Clip:
    """The performance of a clip, not yet drawn."""
    actor = make_actor(spec.identity, HELD_OUT_VOICES if spec.held_out else TRAINING_VOICES)
    actor = replace(actor, expressiveness=actor.expressiveness * spec.strength)
    return perform(actor, spec.text, spec.media, spec.seed)


def extract(clip: Clip) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Audio features, face features and their validity, by the runtime's extractors."""
    from mse_runtime.features.audio import lld13
    from mse_runtime.features.face import FaceExtractor

    extractor = FaceExtractor(threads=1)
    for moment, picture in frames(clip, FPS, SIZE):
        extractor.add(picture, moment)
    track = extractor.finish().track
    return lld13(clip.audio).values, track.values, track.valid


def _key(spec: ClipSpec) -> str:
    """What a rendered clip must still be to be used: its name is not enough, its labels count."""
    return f"{spec.name} {spec.seed} {spec.text}"


def _render_shard(specs: Sequence[ClipSpec], path: Path) -> int:
    arrays: dict[str, Any] = {}
    for k, spec in enumerate(specs):
        audio, face, valid = extract(act(spec))
        arrays[f"a{k}"], arrays[f"f{k}"], arrays[f"v{k}"] = audio, face, valid
    arrays["names"] = np.array([_key(spec) for spec in specs])
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)
    return len(specs)


def _shards(specs: Sequence[ClipSpec], folder: Path, split: str) -> Iterator[tuple[Path, Any]]:
    for start in range(0, len(specs), _SHARD):
        yield folder / f"{split}-{start:05d}.npz", specs[start : start + _SHARD]


def render_all(specs: Sequence[ClipSpec], folder: Path, split: str, *, workers: int = 1) -> None:
    """Render what is not there yet, a shard at a time, in `workers` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(part, path) for path, part in _shards(specs, folder, split) if not path.exists()]
    if not missing:
        return
    began, done = time.monotonic(), 0
    total = sum(len(part) for part, _ in missing)
    if workers <= 1:
        for part, path in missing:
            done += _render_shard(part, path)
            _LOG.info("%s: %d of %d clips, %.0f s", split, done, total, time.monotonic() - began)
        return
    with ProcessPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(_render_shard, *item) for item in missing]):
            done += future.result()
            _LOG.info("%s: %d of %d clips, %.0f s", split, done, total, time.monotonic() - began)


def write_all(
    specs: Sequence[ClipSpec],
    folder: Path,
    painter: Callable[[int], Painter] | None = None,
) -> None:
    """Write clips as .mp4 files, those that are not there yet; `painter` paints an identity."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, spec in enumerate(specs):
        path = folder / f"{spec.name}.mp4"
        if not path.exists():
            partial = folder / f".{spec.name}.{os.getpid()}.mp4"
            who = painter(spec.identity) if painter is not None else None
            write_mp4(partial, act(spec), fps=10, size=320, painter=who)
            partial.replace(path)
        if k % 60 == 59:
            _LOG.info("%s: %d of %d clips", folder.name, k + 1, len(specs))


def load(specs: Sequence[ClipSpec], folder: Path, split: str) -> list[Rendered]:
    """The rendered clips of a split, in order; shards that are not there yet are passed over."""
    out = []
    for path, part in _shards(specs, folder, split):
        if not path.exists():
            continue
        with np.load(path, allow_pickle=False) as data:
            for k, spec in enumerate(part):
                if str(data["names"][k]) != _key(spec):
                    raise UsageError(
                        f"{path} holds other clips than this run's (another seed or scale?): "
                        "give an empty folder with --work, or delete that file."
                    )
                out.append(Rendered(spec, data[f"a{k}"], data[f"f{k}"], data[f"v{k}"]))
    return out
