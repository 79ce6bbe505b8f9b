"""Text to token ids and back, special spellings staying text unless asked for."""

from __future__ import annotations

import ctypes
import heapq
import os
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mse_runtime.backbone.reports import log_errors, log_mark
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["Speller", "load_vocabulary"]

_UNKNOWN, _NORMAL, _CONTROL, _USER_DEFINED, _BYTE = (1 << i for i in (0, 2, 3, 4, 5))
"""Of llama_token_attr."""
_MAX_BYTES = 1 << 28


def load_vocabulary(lib: Any, path: Path, name: Path) -> Any:
    """A model of llama.cpp's that is a vocabulary and nothing else; name: of the user's file."""
    mark = log_mark()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    no_devices = (ctypes.c_void_p * 1)(None)
    params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        why = log_errors(mark) or "no reason given"
        raise BackboneError(
            f"llama.cpp cannot load the vocabulary of {name}: {why}. Export or download the model "
            "again."
        )
    return model


class Speller:
    """llama.cpp's tokenizer of one vocabulary."""

    def __init__(self, lib: Any, vocab: Any, gguf: Gguf) -> None:
        self._lib, self._vocab, self._gguf = lib, vocab, gguf
        self._sentencepiece = gguf.value("tokenizer.ggml.model", "") == "llama"
        self._pieces: dict[str, tuple[float, int]] | None = None
        self._bytes: dict[bytes, int] | None = None

    @overload
    def tokenize(self, text: str, special: bool) -> npt.NDArray[np.int32]: ...

    @overload
    def tokenize(
        self, text: str, special: bool, *, whole: bool
    ) -> npt.NDArray[np.int32] | None: ...

    def tokenize(
        self, text: str, special: bool, *, whole: bool = True
    ) -> npt.NDArray[np.int32] | None:
        """int32 [n]. NUL is an ordinary character; lone surrogates raise BackboneError.

        whole: False for an excerpt of the vocabulary; None where that does not do.
        """
        if not isinstance(text, str):
            raise BackboneError(f"Text must be a str, not {type(text).__name__}. Decode it first.")
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BackboneError(
                f"The text holds broken characters (at {error.start}): it was not valid UTF-8. "
                "Decode it with errors='replace' first."
            ) from error
        if len(raw) > _MAX_BYTES:
            raise BackboneError(f"The text is {len(raw)} bytes long; cut it to {_MAX_BYTES}.")
        if not raw:
            return np.empty(0, np.int32)
        ids = self._call(raw, special)
        return ids if special else self._without_controls(ids, whole)

    def _call(self, raw: bytes, special: bool) -> npt.NDArray[np.int32]:
        room = len(raw) + 8
        while True:
            ids = np.empty(room, np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(self._lib.llama_token))
            count = self._lib.llama_tokenize(
                self._vocab, raw, len(raw), pointer, room, False, special
            )
            if count >= 0:
                return ids[:count].copy()
            if -count <= room:
                raise BackboneError("llama.cpp cannot tokenise this text. Shorten it.")
            room = -count

    def _without_controls(
        self, ids: npt.NDArray[np.int32], whole: bool
    ) -> npt.NDArray[np.int32] | None:
        """llama.cpp doesn't parse special spellings here, but its merges may still build one.

        A SentencePiece vocabulary with the pieces `s` and `op` merges them into ChatGLM's control
        token `sop`: SentencePiece itself would not. Around such an id the pieces are merged anew.
        """
        foreign, apart = _CONTROL, ~_CONTROL
        if self._sentencepiece:  # falls back to bytes: "unknown" is never its answer either
            foreign, apart = _CONTROL | _UNKNOWN, _USER_DEFINED
        kinds = [self._kind(token) for token in ids.tolist()]
        if not any(kind & foreign for kind in kinds):
            return ids
        if not whole:
            return None
        found: list[int] = []
        for mergeable, run in groupby(
            zip(ids.tolist(), kinds, strict=True), lambda each: not each[1] & apart
        ):
            tokens = list(run)
            if mergeable and any(kind & foreign for _, kind in tokens):
                raw = b"".join(self._spelling(token, kind) for token, kind in tokens)
                found += self._merged(raw.decode("utf-8", errors="replace"))
            else:
                found += [token for token, _ in tokens]
        return np.array(found, np.int32)

    def _kind(self, token: int) -> int:
        return int(self._lib.llama_vocab_get_attr(self._vocab, token))

    def _spelling(self, token: int, kind: int) -> bytes:
        text: bytes = self._lib.llama_vocab_get_text(self._vocab, token) or b""
        return bytes([int(text[3:5], 16)]) if kind & _BYTE else text

    def _merged(self, text: str) -> list[int]:
        """SentencePiece's own rule, control tokens left out: the neighbours whose joint piece has
        the highest score are merged first, the leftmost of equals, until none is in the vocabulary.
        """
        pieces = self._plain_pieces()
        parts: list[str | None] = list(text)
        before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        queue: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            right = after[left] if left >= 0 else len(parts)
            if right < len(parts):
                joined = f"{parts[left]}{parts[right]}"
                if joined in pieces:
                    heapq.heappush(queue, (-pieces[joined][0], left, joined))

        for start in range(len(parts)):
            offer(start)
        while queue:
            _, left, joined = heapq.heappop(queue)
            right = after[left]
            if parts[left] is None or right == len(parts):
                continue
            if f"{parts[left]}{parts[right]}" != joined:
                continue  # one of the two has been merged since
            parts[left], parts[right] = joined, None
            after[left] = after[right]
            if after[right] < len(parts):
                before[after[right]] = left
            offer(before[left])
            offer(left)
        return [token for part in parts if part is not None for token in self._ids(part, pieces)]

    def _plain_pieces(self) -> dict[str, tuple[float, int]]:
        """Ordinary pieces: spelling -> (score, id); of other vocabularies only the characters."""
        if self._pieces is None:
            tokens = self._gguf.array("tokenizer.ggml.tokens")
            scores = [0.0] * len(tokens)
            if self._gguf.array_length("tokenizer.ggml.scores") == len(tokens):
                scores = self._gguf.array("tokenizer.ggml.scores")
            self._pieces = {
                piece: (score, index)
                for index, (piece, score) in enumerate(zip(tokens, scores, strict=True))
                if self._kind(index) & _NORMAL and (self._sentencepiece or len(piece) == 1)
            }
        return self._pieces

    def _ids(self, part: str, pieces: dict[str, tuple[float, int]]) -> list[int]:
        """The id of a piece; the ids of its bytes where the vocabulary does not have it."""
        if part in pieces:
            return [pieces[part][1]]
        if self._bytes is None:
            tokens = self._gguf.array("tokenizer.ggml.tokens")
            self._bytes = {
                self._spelling(index, _BYTE): index
                for index in range(len(tokens))
                if self._kind(index) & _BYTE
            }
        return [self._bytes[bytes([b])] for b in part.encode() if bytes([b]) in self._bytes]

    def detokenize(self, ids: npt.NDArray[np.int32], special: bool) -> str:
        """Text of ids; broken UTF-8 becomes U+FFFD."""
        if not len(ids):
            return ""
        ids = np.ascontiguousarray(ids, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(self._lib.llama_token))
        room = 8 * len(ids) + 16
        while True:
            raw = ctypes.create_string_buffer(room)
            size = self._lib.llama_detokenize(
                self._vocab, pointer, len(ids), raw, room, False, special
            )
            if size >= 0:
                return raw.raw[:size].decode("utf-8", errors="replace")
            room = -size
