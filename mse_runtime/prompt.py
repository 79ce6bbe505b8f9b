"""The prompt as data: a task's segments become token ids with a place for the pseudo tokens.

A task's prompt is an ordered list of segments: fixed text, the slot of the transcript and the slot
of the adapter's pseudo tokens. Each text segment is tokenised alone, as the published code does
(published-model spec, sections 2 and 3); nothing here knows the name of a backbone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import BundleError, UsageError
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from mse_runtime.bundle import Segment, TextInput

__all__ = ["Piece", "Prompt", "Tokenizer", "build", "check_text", "tokenize_text"]

Ids = NDArray[np.int32]
Rows = NDArray[np.float32]
# A tokeniser may be quadratic in the length of a word: more text than this is cut before it.
MAX_CHARS_PER_TOKEN = 256


class Tokenizer(Protocol):
    """What a prompt needs of a backbone."""

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> Ids: ...


@dataclass(frozen=True)
class Piece:
    """A run of the prompt: `ids` [n], or the place of the pseudo tokens (`ids` empty)."""

    slot: Literal["fixed", "text", "pseudo"]
    ids: Ids


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    `text_ids` [Tt] are the transcript's ids as the adapter sees them, pads included;
    `n_text_total` counts the transcript's tokens before truncation.
    """

    pieces: tuple[Piece, ...]
    n_pseudo: int
    text_ids: Ids
    n_text_total: int

    @property
    def early(self) -> Ids:
        """Ids of everything before the pseudo tokens: what can be prefilled without features."""
        return _join(self.pieces[: self._slot])

    @property
    def late(self) -> Ids:
        """Ids of everything after the pseudo tokens."""
        return _join(self.pieces[self._slot + 1 :])

    @property
    def n_constant(self) -> int:
        """Leading positions that do not depend on the transcript or the clip."""
        count = 0
        for piece in self.pieces:
            if piece.slot != "fixed":
                break
            count += len(piece.ids)
        return count

    @property
    def _slot(self) -> int:
        return next(i for i, piece in enumerate(self.pieces) if piece.slot == "pseudo")

    def __len__(self) -> int:
        """Positions of the whole prompt, pseudo tokens included."""
        return sum(len(piece.ids) for piece in self.pieces) + self.n_pseudo

    def rows(self, embed: Callable[[Ids], Rows], pseudo: Rows) -> Rows:
        """The prompt as embedding rows [L, D]: token rows from `embed`, `pseudo` [P, D] between."""
        return np.concatenate([embed(self.early), pseudo, embed(self.late)])


def check_text(text: str) -> str:
    """The transcript as given, or a `UsageError` where it cannot be one."""
    if not text.strip():
        raise UsageError(
            "The text is empty. The adapter mixes voice and face into what is said, so it "
            'needs the transcript: mse-run clip.mp4 "what the person says".'
        )
    if "\x00" in text:
        raise UsageError(
            "The text contains a NUL character, so it is probably not text. Give the transcript as "
            "plain UTF-8."
        )
    if any(unicodedata.category(char) == "Cs" for char in text):
        raise UsageError(
            "The text is not valid UTF-8 (some bytes could not be decoded). Convert it first, for "
            "example with: iconv -f latin1 -t utf-8 transcript.txt"
        )
    return text


def tokenize_text(tokenizer: Tokenizer, text: str, rule: TextInput) -> tuple[Ids, int]:
    """The transcript's ids under the bundle's rule, and how many tokens it had before truncation.

    Truncation keeps the first `max_tokens`; with `pad == "left"` the result always has exactly
    `max_tokens` ids, pads in front (published-model spec, section 2).
    """
    limit = rule.max_tokens
    if rule.normalise == "nfc":
        text = unicodedata.normalize("NFC", text[: 2 * limit * MAX_CHARS_PER_TOKEN])
    ids = tokenizer.tokenize(text[: limit * MAX_CHARS_PER_TOKEN], special=rule.special)
    total = len(ids)
    if len(text) > limit * MAX_CHARS_PER_TOKEN:
        total = max(total, limit + 1)
    ids = ids[:limit]
    if rule.pad == "left":
        ids = np.concatenate([np.full(limit - len(ids), rule.pad_id, np.int32), ids])
    return ids.astype(np.int32), total


def build(
    tokenizer: Tokenizer,
    segments: tuple[Segment, ...],
    rule: TextInput,
    text: str,
    n_pseudo: int,
) -> Prompt:
    """Tokenise a task's `segments` around `text`."""
    text_ids, total = tokenize_text(tokenizer, check_text(text), rule)
    pieces = tuple(_piece(tokenizer, segment, text_ids) for segment in segments)
    slots = [piece.slot for piece in pieces]
    if slots.count("pseudo") != 1 or slots.count("text") != 1:
        raise BundleError(
            "The bundle's prompt must have exactly one `pseudo` and one `text` slot; it has "
            f"{slots.count('pseudo')} and {slots.count('text')}. Export the bundle again."
        )
    return Prompt(pieces, n_pseudo, text_ids, total)


def _piece(tokenizer: Tokenizer, segment: Segment, text_ids: Ids) -> Piece:
    if segment.slot == "pseudo":
        return Piece("pseudo", np.empty(0, np.int32))
    if segment.slot == "text":
        return Piece("text", text_ids)
    ids = tokenizer.tokenize(segment.text or "", bos=segment.bos, special=segment.special)
    return Piece("fixed", ids)


def _join(pieces: tuple[Piece, ...]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *(piece.ids for piece in pieces)])
