"""Synthetic actors: a person, and a clip of that person saying a sentence with an expression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mse_export.training.tiny.drawing import Look, Pose, draw, random_look
from mse_export.training.tiny.head import EXPRESSIONS, Floats, deform, identity_shape
from mse_export.training.tiny.voice import RATE, Speaker, random_speaker, speak
from mse_export.training.tiny.world import Media

__all__ = ["Actor", "Clip", "make_actor", "perform", "write_mp4"]

#: Paints a frame: action units, pose, randomness -> uint8 [size, size, 3].
Painter = Callable[[Mapping[int, float], Pose, np.random.Generator], NDArray[np.uint8]]

#: How an emotion tends to carry the head: pitch (down), yaw, roll, gaze x and y, per intensity.
_BEARING = {
    0: (0.0, 0.0, 0.0, 0.0, 0.0),
    1: (-0.05, 0.0, 0.0, 0.0, -0.02),
    2: (-0.03, 0.03, 0.0, 0.03, 0.0),
    3: (0.10, 0.0, 0.03, 0.0, 0.07),
    4: (-0.05, 0.0, 0.03, 0.0, 0.0),
    5: (-0.02, 0.09, 0.04, 0.06, 0.02),
    6: (0.06, 0.0, 0.0, 0.0, -0.02),
}
#: Mouth opening while talking: lips part, jaw drops, per unit of loudness.
_TALK = {25: 0.35, 26: 0.12}


@dataclass(frozen=True)
class Actor:
    """A person: shape, look, voice, and how strongly they express."""

    shape: Floats
    look: Look
    speaker: Speaker
    expressiveness: float
    scale: float


@dataclass(frozen=True)
class Clip:
    """A performance, not yet drawn."""

    actor: Actor
    media: Media
    audio: NDArray[np.int16]
    """[n] mono at 16 kHz, with silence before and after."""
    seed: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.audio) / RATE


def make_actor(seed: int, voices: tuple[str, ...]) -> Actor:
    """The actor of a seed; `voices` are espeak-ng's variants to draw from."""
    rng = np.random.default_rng(seed)
    return Actor(
        shape=identity_shape(rng),
        look=random_look(rng),
        speaker=random_speaker(rng, voices),
        expressiveness=float(rng.uniform(1.0, 1.3)),
        scale=float(rng.uniform(0.21, 0.29)),
    )


def perform(
    actor: Actor, text: str, media: Media, seed: int, *, limit: float = 6.0, clean: bool = False
) -> Clip:
    """Say `text` with the face and voice of `media`; cut at `limit` seconds."""
    rng = np.random.default_rng([seed, 1])
    spoken = speak(text, actor.speaker, media.voice, media.voice_intensity, rng, clean=clean)
    before = np.zeros(int(rng.uniform(0.15, 0.4) * RATE), np.int16)
    after = np.zeros(int(rng.uniform(0.2, 0.6) * RATE), np.int16)
    audio = np.concatenate([before, spoken, after])
    shortest = int(1.6 * RATE)
    if len(audio) < shortest:
        audio = np.concatenate([audio, np.zeros(shortest - len(audio), np.int16)])
    return Clip(actor, media, audio[: int(limit * RATE)], seed)


def frames(
    clip: Clip, fps: float, size: int, painter: Painter | None = None
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """The clip's pictures, (time, uint8 [size, size, 3]); drawn, or as `painter` paints them."""
    rng = np.random.default_rng([clip.seed, 2])
    actor, media = clip.actor, clip.media
    expression, bearing = EXPRESSIONS[media.face], _BEARING[media.face]
    strength = media.face_intensity * actor.expressiveness
    onset = clip.duration * rng.uniform(0.05, 0.2)
    base_angles = rng.normal(0, [0.05, 0.08, 0.03])
    drift = rng.normal(0, [0.03, 0.04, 0.02])
    beat = rng.uniform(0.2, 0.5, 3)
    phase = rng.uniform(0, 6, 3)
    place = (0.5 + rng.normal(0, 0.02), 0.42 + rng.normal(0, 0.02))
    blinks = np.cumsum(rng.uniform(1.2, 4.0, 12))
    uneven = {unit: rng.uniform(0.75, 1.2) for unit in expression}
    idle = {1: abs(rng.normal(0, 0.06)), 4: abs(rng.normal(0, 0.06)), 12: abs(rng.normal(0, 0.05))}
    loudness = _loudness(clip.audio, fps)
    for k in range(max(1, int(clip.duration * fps))):
        time = k / fps
        rise = float(np.clip((time - onset * 0.3) / onset, 0.1, 1))
        fall = float(np.clip((clip.duration - time) / 0.4, 0.5, 1))
        now = strength * rise * fall * (1 + 0.08 * np.sin(2 * np.pi * 0.7 * time + phase[0]))
        units = dict(idle)
        for unit, value in expression.items():
            units[unit] = units.get(unit, 0.0) + value * now * uneven[unit]
        talk = float(loudness[min(k, len(loudness) - 1)])
        for unit, value in _TALK.items():
            units[unit] = min(units.get(unit, 0.0) + value * talk, 1.3)
        if np.any(np.abs(blinks - time) < 0.08):
            units[45] = 0.9
        sway = base_angles + drift * np.sin(2 * np.pi * beat * time + phase)
        pose = Pose(
            pitch=float(sway[0] + bearing[0] * now),
            yaw=float(sway[1] + bearing[1] * now),
            roll=float(sway[2] + bearing[2] * now),
            scale=actor.scale * size,
            x=place[0],
            y=place[1],
            gaze=(bearing[3] * now, bearing[4] * now),
        )
        if painter is not None:
            yield time, painter(units, pose, rng)
        else:
            yield time, draw(deform(actor.shape, units), actor.look, pose, size, rng)


def _loudness(audio: NDArray[np.int16], fps: float) -> NDArray[np.float64]:
    """How loud the speech is around each frame, 0..1."""
    hop = max(1, int(RATE / fps))
    count = -(-len(audio) // hop)
    padded = np.zeros(count * hop)
    padded[: len(audio)] = audio
    power = np.sqrt((padded.reshape(count, hop) ** 2).mean(1))
    return np.asarray(np.clip(power / (np.quantile(power, 0.9) + 1e-6), 0, 1))


def write_mp4(
    path: Path,
    clip: Clip,
    *,
    fps: int = 15,
    size: int = 320,
    crf: int = 28,
    painter: Painter | None = None,
) -> None:
    """The clip as H.264 and AAC."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        video = container.add_stream("libx264", rate=fps)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.options = {"crf": str(crf), "preset": "fast", "threads": "1"}
        audio = container.add_stream("aac", rate=RATE)
        audio.layout = "mono"
        audio.bit_rate = 48000
        for _, pixels in frames(clip, fps, size, painter):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode())
        for start in range(0, len(clip.audio), 1024):
            block = np.ascontiguousarray(clip.audio[None, start : start + 1024])
            sound = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            sound.sample_rate = RATE
            sound.pts = start
            container.mux(audio.encode(sound))
        container.mux(audio.encode())
