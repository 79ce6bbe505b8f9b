"""From a clip to features: sound, picture and face work side by side.

One thread reads and describes the sound, one decodes frames, and the caller's thread follows the
face. Each is sequential in itself, so results don't depend on how many of them run at once.
"""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime import background
from mse_runtime.errors import UsageError
from mse_runtime.features.spec import Features, FeatureTrack, get_spec, is_encoder_id
from mse_runtime.features.stages import Watch, ahead

if TYPE_CHECKING:
    from mse_runtime.bundle import Bundle
    from mse_runtime.features.encoders import AudioEncoder, ImageEncoder
    from mse_runtime.features.face import FaceExtractor, FaceResult
    from mse_runtime.features.npz import load_npz, save_npz
    from mse_runtime.media import ClipInfo, Sample, Window

__all__ = ["extract", "load_npz", "save_npz"]


def __getattr__(name: str) -> Any:
    # Reading and writing files is offered here too, but costs an import most runs don't need.
    if name in ("load_npz", "save_npz"):
        from mse_runtime.features import npz

        return getattr(npz, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_AHEAD = 4
"""Decoded frames that may wait for the face, 1.6 MB each."""
_SHORT = 0.5
"""Seconds by which a stream may end before its header says so without a word."""
_SOUND_ONLY = frozenset({".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".amr", ".wma"})


def extract(
    path: str | Path,
    *,
    audio_spec: str | None = "lld13/1",
    face_spec: str | None = "face167/1",
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = 60.0,
    threads: int | None = None,
    keep_frames: int = 0,
    bundle: Bundle | None = None,
) -> Features:
    """Features of a clip.

    Args:
        path: a video or sound file.
        audio_spec, face_spec: spec ids; None leaves the modality out without a warning.
        fps: frames looked at a second; None takes the face spec's rate.
        start, end: seconds on the clip's clock.
        max_seconds: longest part that is read; None for no limit.
        threads: how much may run at once; None for all cores of this process, 1 for none beside
            the caller's. The result is the same.
        keep_frames: this many frames, evenly spread, are kept in `info["frames"]` as dicts
            {time, image uint8 [H, W, 3], mesh or None}.
        bundle: where encoders ("hf-audio:<sha>", "hf-image:<sha>") come from.

    Returns:
        Features; a modality the clip doesn't have is None and said in `warnings`. Their
        `info["seconds"]` has what each stage took ("probe", "decode", "audio", "face").

    Raises:
        MediaError: the clip cannot be read. BundleError: unknown spec id.
        UsageError: a spec that cannot be computed here, or a window that makes no sense.
    """
    _check(audio_spec, "audio")
    _check(face_spec, "face")
    watch = Watch()
    face = _Face(face_spec, fps, keep_frames, bundle)
    if Path(path).suffix.lower() not in _SOUND_ONLY:
        # The networks load in a thread of their own while FFmpeg loads here.
        face.load()
    with watch("probe"):
        from mse_runtime import media

        clip = media.probe(path)
        window, said = media.plan_window(clip, start, end, max_seconds)
    cores = background.cores() if threads is None else max(1, threads)
    sound = _Sound(audio_spec, bundle)
    if cores > 1:
        heard = background.start(lambda: sound.run(clip, window, watch), "mse-sound")
        try:
            face.run(clip, window, watch, cores)
        finally:
            wait([heard])
        heard.result()
    else:
        sound.run(clip, window, watch)
        face.run(clip, window, watch, cores)
    stop = max(sound.end, face.end, window.start)
    warnings = [
        *clip.warnings,
        *_masked(clip, audio_spec, face_spec),
        *said,
        *sound.warnings,
        *face.warnings,
    ]
    warnings += _breaks_off(clip, window, sound.end, face.end)
    info: dict[str, Any] = {
        "clip": {"format": clip.format, "declared_seconds": clip.duration},
        "window": [window.start, stop],
        "fps": face.fps,
        "decode": face.stats,
        "face": face.info,
        "seconds": watch.spent,
    }
    if keep_frames:
        info["frames"] = face.pictures()
    unique = tuple(dict.fromkeys(warnings))
    return Features(sound.track, face.track, stop - window.start, unique, info)


class _Sound:
    """The voice: one window's sound and its descriptors."""

    def __init__(self, spec_id: str | None, bundle: Bundle | None) -> None:
        self.spec_id = spec_id
        self._encoder: AudioEncoder | None = None
        if spec_id is not None and is_encoder_id(spec_id):
            from mse_runtime.features.encoders import open_audio_encoder

            self._encoder = open_audio_encoder(_needed(bundle, spec_id), spec_id)
        self.track: FeatureTrack | None = None
        self.warnings: list[str] = []
        self.end = 0.0

    def run(self, clip: ClipInfo, window: Window, watch: Watch) -> None:
        if self.spec_id is None or clip.audio is None:
            return
        from mse_runtime.media import SoundReader

        with watch("audio"):
            wave = SoundReader(clip, window).read()
            if wave is None:
                return
            self.warnings += wave.warnings
            if not len(wave.samples):
                self.warnings.append("no sound in this part of the clip: the voice is masked")
                return
            self.end = wave.end
            if self._encoder is not None:
                self.track = self._encoder(wave.samples, wave.start)
            else:
                self.track = describe_sound(wave.samples, wave.start, self.spec_id)
        if not len(self.track):
            self.track = None
            self.warnings.append("the sound is shorter than 20 ms: the voice is masked")


class _Face:
    """The face: frames decoded ahead in one thread, followed in the caller's."""

    def __init__(
        self, spec_id: str | None, fps: float | None, keep: int, bundle: Bundle | None
    ) -> None:
        self.fps = fps
        self.track: FeatureTrack | None = None
        self.warnings: list[str] = []
        self.end = 0.0
        self.stats: dict[str, Any] = {}
        self.info: dict[str, Any] = {}
        self._spec_id = spec_id
        self._bundle = bundle
        self._kept = _Keeper(keep)
        self._extractor: FaceExtractor | ImageEncoder | None = None
        self._result: FaceResult | None = None

    def load(self) -> FaceExtractor | ImageEncoder | None:
        """The extractor; its networks load in a thread of their own from here on."""
        if self._spec_id is None or self._extractor is not None:
            return self._extractor
        keep = self._kept.wanted > 0
        if is_encoder_id(self._spec_id):
            from mse_runtime.features.encoders import open_image_encoder

            encoder = open_image_encoder(
                _needed(self._bundle, self._spec_id), self._spec_id, keep_mesh=keep
            )
            self._extractor, rate = encoder, encoder.spec.rate
        else:
            from mse_runtime.features.face import FaceExtractor

            self._extractor = FaceExtractor(self._spec_id, keep_mesh=keep)
            rate = get_spec(self._spec_id).rate
        self.fps = self.fps or rate
        return self._extractor

    def run(self, clip: ClipInfo, window: Window, watch: Watch, cores: int) -> None:
        extractor = self.load() if clip.video is not None else None
        if extractor is None or self.fps is None:
            return
        from mse_runtime.media import FrameReader

        reader = FrameReader(clip, window, self.fps, threads=cores)
        samples = watch.each("decode", reader)
        count = 0
        for sample in ahead(samples, _AHEAD) if cores > 1 else samples:
            with watch("face"):
                extractor.add(sample.image, sample.time)
            self._kept.offer(count, sample)
            count += 1
        self.warnings += reader.warnings
        self.stats = reader.stats
        self.end = reader.stats["end"] or 0.0
        if not count:
            self.warnings.append("no picture in this part of the clip: the face is masked")
            return
        with watch("face"):
            self._result = extractor.finish()
        self.track, self.info = self._result.track, self._result.info
        self.warnings += self._result.warnings

    def pictures(self) -> list[dict[str, Any]]:
        """The kept frames with the chosen face's mesh on them."""
        meshes = None if self._result is None else self._result.mesh
        return [
            {"time": when, "image": image, "mesh": None if meshes is None else meshes[row]}
            for row, when, image in self._kept.spread()
        ]


class _Keeper:
    """Keeps some frames, evenly spread over a clip of unknown length."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._stride = 1
        self._held: list[tuple[int, float, NDArray[np.uint8]]] = []

    def offer(self, row: int, sample: Sample) -> None:
        if self.wanted < 1 or row % self._stride:
            return
        self._held.append((row, sample.time, sample.image[:, :, :3].copy()))
        if len(self._held) >= 2 * self.wanted + 1:
            self._held = self._held[::2]
            self._stride *= 2

    def spread(self) -> list[tuple[int, float, NDArray[np.uint8]]]:
        picks = np.linspace(0, len(self._held) - 1, min(self.wanted, len(self._held)))
        return [self._held[round(i)] for i in picks]


def describe_sound(samples: NDArray[np.int16], start: float, spec_id: str) -> FeatureTrack:
    """The track `spec_id` of mono sound at 16 kHz that begins at `start` on the clip's clock."""
    if spec_id == "egemaps25/1":
        from mse_runtime.features.egemaps import HOP, egemaps_llds

        values = egemaps_llds(samples)
        times = start + HOP * (np.arange(len(values), dtype=np.float64) + 1)
        return FeatureTrack(spec_id, values, np.ones(len(values), np.bool_), times)
    from mse_runtime.features.audio import lld13

    return lld13(samples, start)


def _check(spec_id: str | None, modality: str) -> None:
    if spec_id is None:
        return
    if is_encoder_id(spec_id):
        kind, extractable = ("audio" if spec_id.startswith("hf-audio:") else "face"), True
    else:
        spec = get_spec(spec_id)
        kind, extractable = spec.modality, spec.extractable
    if kind != modality:
        raise UsageError(f"{spec_id} describes the {kind}, not the {modality}.")
    if not extractable:
        raise UsageError(
            f"{spec_id} cannot be computed from a clip: {get_spec(spec_id).description}. "
            "Give the data set's own features with --features FILE.npz."
        )


def _needed(bundle: Bundle | None, spec_id: str) -> Bundle:
    if bundle is None:
        raise UsageError(f"{spec_id} is an encoder in a bundle: give that bundle too.")
    return bundle


def _masked(clip: ClipInfo, audio_spec: str | None, face_spec: str | None) -> list[str]:
    said = []
    if clip.audio is None and audio_spec is not None:
        said.append("the clip has no sound: the voice is masked")
    if clip.video is None and face_spec is not None and not clip.warnings:
        said.append("the clip has no moving picture: the face is masked")
    return said


def _breaks_off(clip: ClipInfo, window: Window, heard: float, seen: float) -> list[str]:
    """A truncated file decodes without an error; only the declared lengths give it away.

    `heard` and `seen`: seconds on the clip's clock up to which a stream was read, 0 if it wasn't.
    """
    declared = [
        ("the sound", heard, clip.audio.end if clip.audio else None),
        ("the picture", seen, clip.video.end if clip.video else None),
    ]
    ends = [(what, got, end) for what, got, end in declared if got and end]
    if not ends and clip.duration and heard and seen:
        # Some containers declare only the whole.
        ends = [("the clip", max(heard, seen), clip.duration)]
    said = []
    for what, got, end in ends:
        expected = min(end, window.end)
        if expected - got > max(_SHORT, 0.02 * (expected - window.start)):
            said.append(
                f"{what} breaks off at {got:.1f} s of a declared {end:.1f} s: "
                "the file is probably truncated or damaged, what there is was used"
            )
    return said
