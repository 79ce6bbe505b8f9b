"""Features on their way to the adapter: checked once, normalised, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mse_runtime.bundle import FeatureInput, FeatureInputs
from mse_runtime.datasets import Problem, Sample
from mse_runtime.errors import MSEError
from mse_runtime.features.normalise import prepare
from mse_runtime.features.spec import FeatureTrack

__all__ = ["FeatureStore", "Moments", "Prepared", "check_features"]

CACHE_BYTES = 2 << 30
FLOOR = 1e-6


@dataclass(frozen=True)
class Prepared:
    """What the adapter gets: normalised values [T, d] and how many rows of them count."""

    audio: NDArray[np.float32]
    audio_len: int
    face: NDArray[np.float32]
    face_len: int

    @property
    def nbytes(self) -> int:
        return self.audio.nbytes + self.face.nbytes


class FeatureStore:
    """Normalised features by sample, the most recent `limit` bytes of them in memory."""

    def __init__(self, inputs: FeatureInputs, limit: int = CACHE_BYTES) -> None:
        self._inputs = inputs
        self._limit = limit
        self._kept: OrderedDict[str, Prepared] = OrderedDict()
        self._bytes = 0

    def get(self, sample: Sample) -> Prepared:
        found = self._kept.get(sample.id)
        if found is not None:
            self._kept.move_to_end(sample.id)
            return found
        features = sample.features()
        audio, audio_len = prepare(features.audio, self._inputs.audio)
        face, face_len = prepare(features.face, self._inputs.face)
        found = Prepared(audio, audio_len, face, face_len)
        if sample.held is None:  # what is held is in memory anyway
            self._kept[sample.id] = found
            self._bytes += found.nbytes
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


class Moments:
    """Mean and standard deviation by column over valid rows, one track at a time."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._sum = np.zeros(dim)
        self._squares = np.zeros(dim)
        self.longest = 1

    def add(self, track: FeatureTrack | None) -> None:
        if track is None:
            return
        self.longest = max(self.longest, len(track))
        rows = track.values[track.valid].astype(np.float64)
        rows = rows[np.isfinite(rows).all(axis=1)]
        self.count += len(rows)
        self._sum += rows.sum(axis=0)
        self._squares += (rows**2).sum(axis=0)

    def into(self, feature: FeatureInput) -> FeatureInput:
        """`feature` with these statistics; a constant column keeps its scale."""
        if not self.count:
            return feature
        mean = self._sum / self.count
        std = np.sqrt(np.maximum(self._squares / self.count - mean**2, 0.0))
        std[std < FLOOR * np.maximum(1.0, np.abs(mean))] = 1.0
        return replace(feature, mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def check_features(
    samples: Iterable[Sample],
    inputs: FeatureInputs,
    *,
    moments: tuple[Moments, Moments] | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[Problem]:
    """Read every sample's features once: what cannot be read, has other columns or holds NaN.

    NaN and infinity are a problem only where the inputs say `refuse`; missing modalities are none,
    a sample with neither is. Good tracks are added to `moments` (audio, face).
    """
    problems = []
    for sample in samples:
        step()
        try:
            features = sample.features()
        except MSEError as error:
            problems.append(Problem(sample.id, str(error)))
            continue
        found = [
            text
            for track, expected, name in (
                (features.audio, inputs.audio, "audio"),
                (features.face, inputs.face, "face"),
            )
            if track is not None and (text := _fault(track, expected, name))
        ]
        if features.audio is None and features.face is None:
            found.append("has neither audio nor face features")
        if found:
            problems.append(Problem(sample.id, "; ".join(found)))
        elif moments:
            moments[0].add(features.audio)
            moments[1].add(features.face)
    return problems


def _fault(track: FeatureTrack, expected: FeatureInput, name: str) -> str:
    if track.spec and track.spec != expected.spec:
        return f"{name} features are {track.spec}, expected {expected.spec}"
    if track.dim != expected.dim:
        return f"{name} features have {track.dim} columns, {expected.spec} has {expected.dim}"
    if expected.nonfinite == "refuse":
        bad = ~np.isfinite(track.values).all(axis=1) & track.valid
        if bad.any():
            return f"{name} features hold NaN or infinity in {bad.sum()} of {len(track)} rows"
    return ""
