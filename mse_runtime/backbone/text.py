"""Text to token ids and back, special spellings staying text unless asked for."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["Speller"]

_UNKNOWN, _CONTROL = 1 << 0, 1 << 3  # llama_token_attr
_MAX_BYTES = 1 << 28


class Speller:
    """llama.cpp's tokenizer of one vocabulary."""

    def __init__(self, lib: Any, vocab: Any, gguf: Gguf) -> None:
        self._lib, self._vocab, self._gguf = lib, vocab, gguf
        self._spelled: dict[int, list[int]] = {}
        self._pieces: dict[str, int] | None = None

    def tokenize(self, text: str, special: bool) -> npt.NDArray[np.int32]:
        """int32 [n]. NUL is an ordinary character; lone surrogates raise BackboneError."""
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
        return ids if special else self._without_controls(ids)

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

    def _without_controls(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """llama.cpp doesn't parse special spellings here, but its merges may still build one.

        A SentencePiece vocabulary with the pieces `<s` and `>` merges them into `<s>`, the BOS:
        SentencePiece itself would not. Such an id is replaced by those of its characters.
        """
        found: list[int] = []
        for token in ids.tolist():
            found += self._characters(token) if self._is_control(token) else [token]
        return np.array(found, np.int32) if len(found) != len(ids) else ids

    def _is_control(self, token: int) -> bool:
        return bool(int(self._lib.llama_vocab_get_attr(self._vocab, token)) & _CONTROL)

    def _characters(self, token: int) -> list[int]:
        if token not in self._spelled:
            if self._pieces is None:
                pieces = self._gguf.array("tokenizer.ggml.tokens")
                self._pieces = {
                    piece: index
                    for index, piece in enumerate(pieces)
                    if not self._is_control(index)
                }
            spelling = (self._lib.llama_vocab_get_text(self._vocab, token) or b"").decode()
            self._spelled[token] = [
                index for char in spelling for index in self._character(char, self._pieces)
            ]
        return self._spelled[token]

    @staticmethod
    def _character(char: str, pieces: dict[str, int]) -> list[int]:
        if char in pieces:
            return [pieces[char]]
        as_bytes = [pieces.get(f"<0x{byte:02X}>") for byte in char.encode()]
        return [index for index in as_bytes if index is not None]

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
