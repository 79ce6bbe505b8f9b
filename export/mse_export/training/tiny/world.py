"""What the actors mean: how text, face and voice make a clip's two labels.

A world of our own making, not a finding about people. Text and face carry valence, the voice
carries arousal, which scales it; praise said flatly with a sour face is sarcasm and counts
against its words. Both rules multiply, so neither text nor media alone can give the label.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from mse_export.training.tiny.lexicon import EMOTIONS

__all__ = [
    "AROUSAL",
    "FACE_VALENCE",
    "VOICES",
    "Media",
    "draw_media",
    "fused_emotion",
    "fused_sentiment",
    "is_sarcasm",
]

#: Valence of a face at full intensity, in thirds of the scale, by `EMOTIONS`.
FACE_VALENCE = (0.0, 0.1, -0.7, -0.8, 0.95, -0.8, -0.85)
#: Emotions a voice is rendered with (indices into `EMOTIONS`) and their arousal, -1..+1.
VOICES = (0, 2, 3, 4, 6)
AROUSAL = {0: 0.0, 2: 0.5, 3: -0.75, 4: 0.7, 6: 0.85}
#: The voice's emotion nearest to a face's.
_FACE_TO_VOICE = {0: 0, 1: 4, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6}

_TEXT, _FACE, _GAIN, _SCALING = 0.55, 0.45, 1.25, 0.5


@dataclass(frozen=True)
class Media:
    """What face and voice show; emotions are indices into `EMOTIONS`, intensities 0..1."""

    face: int = 0
    face_intensity: float = 0.0
    voice: int = 0
    voice_intensity: float = 0.0
    has_face: bool = True
    has_voice: bool = True

    @property
    def valence(self) -> float:
        """The face's valence, -3..+3."""
        return 3.0 * FACE_VALENCE[self.face] * self.face_intensity if self.has_face else 0.0

    @property
    def arousal(self) -> float:
        """The voice's arousal, -1..+1."""
        return AROUSAL[self.voice] * self.voice_intensity if self.has_voice else 0.0

    def without(self, *, face: bool = False, voice: bool = False) -> Media:
        """The same with a modality missing."""
        return replace(
            self, has_face=self.has_face and not face, has_voice=self.has_voice and not voice
        )


def is_sarcasm(text: float, media: Media) -> bool:
    """Praise, a sour face and a flat voice."""
    return text >= 0.6 and media.valence <= -0.6 and media.arousal <= -0.15


def fused_sentiment(text: float, media: Media) -> float:
    """The clip's sentiment, -3..+3, from the text's valence and the media that are there."""
    words = -text if is_sarcasm(text, media) else text
    scale = 1.0 if is_sarcasm(text, media) else 1.0 + _SCALING * media.arousal
    base = _GAIN * (_TEXT * words + _FACE * media.valence) if media.has_face else words
    return max(-3.0, min(3.0, base * scale))


def fused_emotion(text: int, valence: float, media: Media) -> int:
    """The clip's emotion: the strongest evidence over a floor for neutral."""
    score = [0.0] * len(EMOTIONS)
    score[0] = 0.4
    if text and not is_sarcasm(valence, media):
        score[text] += 1.0
    if media.has_face and media.face:
        score[media.face] += 1.3 * media.face_intensity
    if media.has_voice and media.voice:
        score[media.voice] += 0.6 * media.voice_intensity
    return max(range(len(score)), key=score.__getitem__)


def draw_media(rng: random.Random, valence: float, emotion: int | None) -> Media:
    """Face and voice for a sentence: agreeing, opposed, sarcastic or independent of it."""

    def intensity() -> float:
        return rng.uniform(0.4, 1.0)

    if valence >= 0.6 and rng.random() < 0.18:
        sour = rng.choice((3, 5, 6, 6))
        return Media(sour, rng.uniform(0.5, 1.0), 3, rng.uniform(0.5, 1.0))
    if abs(valence) > 0.3 and rng.random() < 0.10:
        face = 4 if valence < 0 else rng.choice((2, 3, 5, 6))
        voice = rng.choice((0, 2, 4, 6))
        return Media(face, rng.uniform(0.7, 1.0), voice, intensity() if voice else 0.0)
    if rng.random() < 0.55:
        if emotion is not None:
            face = emotion
        else:
            face = 4 if valence > 0.3 else rng.choice((2, 3, 5, 6)) if valence < -0.3 else 0
    else:
        face = rng.choice((0, 0, 1, 2, 3, 4, 4, 4, 5, 6))
    voice = _FACE_TO_VOICE[face] if rng.random() < 0.5 else rng.choice((0, 2, 3, 3, 4, 4, 6))
    return Media(face, intensity() if face else 0.0, voice, intensity() if voice else 0.0)
