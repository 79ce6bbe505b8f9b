"""How the language model and the adapter are trained, as data."""

from __future__ import annotations

from dataclasses import dataclass

from mse_export.training.tiny.layout import Layout

__all__ = ["AdapterSchedule", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """One stage of training."""

    steps: int
    rate: float
    batch: int = 128
    word_steps: int = 0
    """Opening steps on single words."""
    slots: bool = False
    """Whether pseudo tokens' places are there and hold evidence."""
    emotion_share: float = 0.25
    sentences: int = 200_000
    seed: int = 0
    save_every: int = 200


@dataclass(frozen=True)
class AdapterSchedule:
    """How one adapter is fitted."""

    steps: int = 500
    rate: float = 1.5e-3
    batch: int = 64
    emotion_share: float = 0.35
    pseudo: int = 4
    layout: Layout = "pseudo-last"
    seed: int = 0
    fresh_text: float = 0.5
    """Share of examples with a sentence that no clip says."""
    fresh_voice: float = 0.5
    """Share of examples whose voice is another clip's."""
    mixer: bool = True
    """False leaves the text out of the text-guided mixer (its gate becomes a constant)."""
    single_scale: bool = False
    """True keeps one expert of the three."""
    warm_up: int = 600
    """Steps in which the encoders alone learn what the actors show, before the first prompt."""
    drop_audio: float = 0.12
    drop_face: float = 0.12
    drop_both: float = 0.05
