"""Neural features: a speech or image encoder that travels in the bundle as an ONNX file.

The entry's form is described in `encoder_config`; the same interface as the built-in extractors.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mse_runtime import background
from mse_runtime.errors import BundleError, UsageError
from mse_runtime.features.encoder_config import (
    AudioConfig,
    ImageConfig,
    entry_of,
    parse_config,
    spec_of,
)
from mse_runtime.features.face import FaceResult, result_of
from mse_runtime.features.geometry import Floats, Picture, Region
from mse_runtime.features.mesh import ROI_SCALE, FaceModels
from mse_runtime.features.sessions import Session
from mse_runtime.features.spec import FeatureSpec, FeatureTrack
from mse_runtime.features.tracks import FaceTracker, Seen

if TYPE_CHECKING:
    from mse_runtime.bundle import Bundle

__all__ = ["AudioEncoder", "ImageEncoder", "open_audio_encoder", "open_image_encoder"]


class AudioEncoder:
    """A speech encoder: waveform -> hidden states."""

    def __init__(self, session: Future[Session], spec: FeatureSpec, config: AudioConfig) -> None:
        self.spec, self.config = spec, config
        self._session = session

    def __call__(
        self, waveform: NDArray[np.int16] | NDArray[np.float32], start: float = 0.0
    ) -> FeatureTrack:
        """Hidden states [T, dim] of a mono waveform [n] (int16, or float32 in -1..1).

        `start`: seconds of the first sample on the clip's clock. A row's time is the middle of
        the samples it has seen at least. Long audio is encoded in pieces of `chunk_seconds`.
        """
        config = self.config
        if waveform.ndim != 1:
            raise UsageError(f"a waveform must be mono [n], not {waveform.shape}.")
        if not waveform.size:
            empty = np.zeros((0, config.dim), np.float32)
            return FeatureTrack(self.spec.id, empty, np.zeros(0, np.bool_), np.zeros(0))
        samples = waveform.astype(np.float32)
        if waveform.dtype == np.int16:
            samples /= 32768
        if config.normalise:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        if samples.size < config.receptive:
            samples = np.pad(samples, (0, config.receptive - samples.size))
        total = (samples.size - config.receptive) // config.stride + 1
        step = int(config.chunk_seconds * config.rate)
        pieces = [self._piece(samples, at, min(step, total - at)) for at in range(0, total, step)]
        values = np.concatenate(pieces)
        middle = np.arange(len(values)) * config.stride + config.receptive / 2
        return FeatureTrack(
            self.spec.id,
            values,
            np.ones(len(values), np.bool_),
            start + middle / config.sample_rate,
        )

    def _piece(self, samples: Floats, first: int, rows: int) -> Floats:
        """Rows `first` .. `first + rows` of the output, from just the samples they need.

        The last piece has what no row covers, too: a group norm in front of the rows sees it.
        """
        config = self.config
        begin = first * config.stride
        end = begin + (rows - 1) * config.stride + config.receptive
        last = samples.size < end + config.stride
        piece = samples[begin:] if last else samples[begin:end]
        hidden = self._session.result()(piece[None])[0]
        if hidden.shape != (1, rows, config.dim):
            raise BundleError(
                f"{self.spec.id}: the encoder gives {hidden.shape} where its config promises "
                f"{(1, rows, config.dim)}: export the bundle again."
            )
        return np.asarray(hidden[0], np.float32)


class ImageEncoder:
    """An image encoder over face crops (or whole frames); used like FaceExtractor.

    Crops of every face are kept as bytes until `finish` has chosen one: about 150 kB for each
    frame and face at 224 x 224.
    """

    def __init__(
        self,
        session: Future[Session],
        spec: FeatureSpec,
        config: ImageConfig,
        *,
        threads: int = 1,
        keep_mesh: bool = False,
    ) -> None:
        self.spec, self.config = spec, config
        self._session = session
        self._keep_mesh = keep_mesh
        self._models = FaceModels(threads=threads) if config.crop == "face" else None
        self._tracker: FaceTracker | None = None
        self._crops: dict[tuple[int, int], NDArray[np.uint8]] = {}  # (face, frame) -> pixels
        self._times: list[float] = []

    def add(self, frame_rgb: NDArray[np.uint8], time: float) -> None:
        """Look at one frame: uint8 [H, W, 3] RGB or [H, W, 4] RGBX; time in s."""
        picture = Picture(frame_rgb)
        index = len(self._times)
        self._times.append(time)
        if self._models is None:
            width, height = picture.size
            middle = Region(width / 2, height / 2, min(width, height))
            self._crops[0, index] = picture.crop(middle, self.config.size)
            return
        if self._tracker is None:
            self._tracker = FaceTracker(self._models.get())
        self._tracker.add(picture, time)
        for track in self._tracker.tracks:
            if track.seen and track.seen[-1].frame == index:
                crop = picture.crop(self._region(track.seen[-1]), self.config.size)
                self._crops[track.number, index] = crop

    def finish(self) -> FaceResult:
        """Choose the face the clip is about and encode its crops."""
        if self._models is not None and self._tracker is None:
            self._tracker = FaceTracker(self._models.get())
        chosen = 0 if self._tracker is None else None
        if self._tracker is not None:
            track, _ = self._tracker.choose()
            chosen = None if track is None else track.number
        frames = len(self._times)
        rows = [index for face, index in sorted(self._crops) if face == chosen]
        values = np.zeros((frames, self.config.dim), np.float32)
        for at in range(0, len(rows), self.config.batch):
            part = rows[at : at + self.config.batch]
            values[part] = self._encode(np.stack([self._crops[chosen or 0, i] for i in part]))
        valid = np.zeros(frames, np.bool_)
        valid[rows] = True
        self._crops.clear()
        track_of = FeatureTrack(self.spec.id, values, valid, np.array(self._times, np.float64))
        if self._tracker is None:
            return FaceResult(track_of, (), {"frames": frames, "valid": frames}, None)
        return result_of(track_of, self._tracker, self._keep_mesh)

    def _region(self, seen: Seen) -> Region:
        region = seen.mesh.next_region()
        return replace(
            region,
            side=region.side / ROI_SCALE * self.config.margin,
            angle=region.angle if self.config.align else 0.0,
        )

    def _encode(self, crops: NDArray[np.uint8]) -> Floats:
        mean, std = (np.array(v, np.float32) for v in (self.config.mean, self.config.std))
        pixels = (crops.astype(np.float32) / 255 - mean) / std
        hidden = self._session.result()(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))[0]
        if math.prod(hidden.shape) != len(crops) * self.config.dim or len(hidden) != len(crops):
            raise BundleError(
                f"{self.spec.id}: the encoder gives {hidden.shape} where its config promises "
                f"{(len(crops), self.config.dim)}: export the bundle again."
            )
        return np.asarray(hidden.reshape(len(crops), self.config.dim), np.float32)


def open_audio_encoder(bundle: Bundle, spec_id: str, *, threads: int = 1) -> AudioEncoder:
    """The speech encoder `spec_id` ("hf-audio:<sha>") of a bundle; BundleError without it."""
    info = entry_of(bundle, spec_id)
    config = parse_config(AudioConfig, info)
    return AudioEncoder(_load(bundle.encoder_path(spec_id), threads), spec_of(info), config)


def open_image_encoder(
    bundle: Bundle, spec_id: str, *, threads: int = 1, keep_mesh: bool = False
) -> ImageEncoder:
    """The image encoder `spec_id` ("hf-image:<sha>") of a bundle; BundleError without it."""
    info = entry_of(bundle, spec_id)
    config = parse_config(ImageConfig, info)
    session = _load(bundle.encoder_path(spec_id), threads)
    return ImageEncoder(session, spec_of(info), config, threads=threads, keep_mesh=keep_mesh)


def _load(path: Path, threads: int) -> Future[Session]:
    """The network, loading beside the caller; what goes wrong is raised at its first use."""
    return background.start(lambda: Session(path, threads=threads), "mse-encoder-load")
