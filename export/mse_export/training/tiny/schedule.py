"""What is trained and how, as data: shapes and schedules. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["AdapterSchedule", "Layout", "Schedule", "TinyConfig"]

Layout = Literal["pseudo-last", "published"]


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model; widths in channels."""

    vocab: int = 4096
    width: int = 192
    layers: int = 4
    heads: int = 4
    feed_forward: int = 512
    context: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def hugging_face(self) -> dict[str, Any]:
        """The same shape as `transformers.LlamaConfig` arguments."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_base,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return asdict(self)


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
