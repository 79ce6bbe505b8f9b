"""Vocabularies as GGUF keys: sentencepiece, byte-level BPE, tiktoken, and made-up ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from mse_runtime.errors import BackboneError

__all__ = ["Kind", "Vocabulary"]


class Kind(IntEnum):
    """ggml's token types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokeniser as llama.cpp needs it."""

    model: Literal["llama", "gpt2"]
    """"llama": sentencepiece BPE by scores; "gpt2": byte-level BPE by merges."""
    pre: str
    """llama.cpp's name of the pre-tokeniser's regular expression."""
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    """Ids by role: bos, eos, unknown, padding."""
    add_bos: bool = False
    add_space_prefix: bool | None = None

    def metadata(self) -> dict[str, Any]:
        """The `tokenizer.ggml.*` keys.

        Raises BackboneError for a token that occurs twice: llama.cpp aborts the process over it.
        """
        seen: set[bytes] = set()
        for token in self.tokens:
            if token in seen:
                raise BackboneError(
                    f"The tokeniser has the token {token!r} twice, which llama.cpp cannot load. "
                    "Check tokenizer files and added tokens of the Hugging Face folder."
                )
            seen.add(token)
        values: dict[str, Any] = {
            "model": self.model,
            "pre": self.pre,
            "tokens": self.tokens,
            "token_type": [int(kind) for kind in self.types],
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
        }
        if self.scores is not None:
            values["scores"] = [float(score) for score in self.scores]
        if self.merges is not None:
            values["merges"] = self.merges
        if self.add_space_prefix is not None:
            values["add_space_prefix"] = self.add_space_prefix
        for role, index in self.special.items():
            values[f"{role}_token_id"] = int(index)
        return {f"tokenizer.ggml.{key}": value for key, value in values.items()}
