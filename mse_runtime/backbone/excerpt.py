"""The part of a vocabulary that a few texts need: llama.cpp takes 0.2 s for 150,000 tokens.

A byte-pair tokenizer only ever looks up tokens that stand in the text, and merges whose result
does (Sennrich et al. 2016); special tokens it looks for everywhere. A vocabulary of those alone, in
the same order, gives the same tokens, by llama.cpp's own tokenizer. Finding them takes a few
milliseconds (`mse_kernels.strings`). `agrees` compares both on samples before a file's are used.
"""

from __future__ import annotations

import os
import struct
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.backbone.head import ARCHITECTURES
from mse_runtime.backbone.text import Speller, load_vocabulary
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["Excerpt", "agrees", "ends", "possible"]

_KEY = "tokenizer.ggml."
_MODEL, _NORMAL = "gpt2", 1
_WORTH, _MOST_TEXT = 50_000, 1 << 14  # tokens; bytes
_FIRST = 16  # ids that stay what they are: llama.cpp's default of a special token is 11
_SAMPLES = (
    "I can't believe it's not 2,048 degrees!  Well... (it was #1) -- isn't that \"great\"?\n\n\tOK",
    "Le déjeuner à Zürich; 東京の天気は良い。你好,世界! Привет, мир. مرحبا بالعالم 한국어 ไทย नमस्ते",
    "\U0001f642\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469 e\u0301 \u00a0\u200b\ufeff "
    "\ufb01 \u00bd \u00b2 \ufdfa \x01\x7f aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa      def f(x):\r\n  x",
    "<|im_start|>user <|endoftext|> <s>[INST] sop [gMASK] <|eot_id|> emotion: -1.5, 0.25 http://a.b",
)


def _letters() -> dict[int, str]:
    """GPT-2's letters for bytes: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_LETTERS = _letters()
_END = "\n"  # is none of them


def possible(gguf: Gguf) -> bool:
    """Whether excerpts of the file's vocabulary can be made, and are worth it."""
    return (
        sys.platform == "linux"  # where a file that is open can be opened again, whatever its name
        and gguf.arch in ARCHITECTURES
        and gguf.metadata.get(f"{_KEY}model") == _MODEL
        and gguf.array_length(f"{_KEY}tokens") >= _WORTH
        and gguf.array_length(f"{_KEY}tokens") == gguf.n_vocab
        and gguf.array_length(f"{_KEY}token_type") == gguf.n_vocab
        and all(0 <= token < gguf.n_vocab for token in ends(gguf))
    )


def ends(gguf: Gguf) -> tuple[int, int]:
    """BOS and EOS as the file names them; -1 where it does not, and llama.cpp has its own idea."""
    bos, eos = (gguf.metadata.get(f"{_KEY}{name}_token_id") for name in ("bos", "eos"))
    return bos if isinstance(bos, int) else -1, eos if isinstance(eos, int) else -1


class Excerpt:
    """What `texts` need of a vocabulary, as llama.cpp loads it. Close it."""

    def __init__(self, lib: Any, gguf: Gguf, texts: Iterable[str]) -> None:
        """Raises BackboneError where none can be made: no kernel library, too much text."""
        self._lib = lib
        self._texts = frozenset(texts)
        within = _END.join(map(_spelled, self._texts)).encode()
        if len(within) > _MOST_TEXT:
            raise BackboneError(f"{len(within)} bytes of text are too much for an excerpt.")
        special = gguf.numbers(f"{_KEY}token_type") != _NORMAL
        special[:_FIRST] = True
        tokens = gguf.strings_within(f"{_KEY}tokens", within, always=special)
        merges = gguf.strings_within(f"{_KEY}merges", within, pairs=True)
        self._ids = np.array([number for number, _ in tokens], np.int32)
        types = gguf.numbers(f"{_KEY}token_type")[self._ids].astype("<i4")
        self._model = _load(lib, gguf, [text for _, text in tokens], types, [m for _, m in merges])
        self._speller = Speller(lib, lib.llama_model_get_vocab(self._model), gguf)

    def covers(self, text: str) -> bool:
        return isinstance(text, str) and any(text in known for known in self._texts)

    def tokenize(self, text: str, special: bool) -> NDArray[np.int32] | None:
        """As `Speller.tokenize`; None for a text that takes the whole vocabulary."""
        if not self.covers(text):
            return None
        found = self._speller.tokenize(text, special, whole=False)
        return None if found is None else self._ids[found]

    def close(self) -> None:
        if self._model is not None:
            self._lib.llama_model_free(self._model)
            self._model = None


def agrees(lib: Any, gguf: Gguf, whole: Speller, texts: Iterable[str]) -> bool:
    """Whether excerpts give the same tokens as the whole vocabulary for samples and `texts`.

    Raises BackboneError where none can be made of them.
    """
    wanted = [*_SAMPLES, *texts]
    excerpt = Excerpt(lib, gguf, wanted)
    try:
        for text in wanted:
            for special in (False, True):
                found = excerpt.tokenize(text, special)
                if found is not None and not np.array_equal(found, whole.tokenize(text, special)):
                    return False
        return True
    finally:
        excerpt.close()


def _spelled(text: str) -> str:
    """In the vocabulary's letters for bytes; composed as well: a bundle may want transcripts so."""
    forms = dict.fromkeys((text, unicodedata.normalize("NFC", text)))
    raw = (form.encode("utf-8", errors="replace").decode("latin-1") for form in forms)
    return _END.join(form.translate(_LETTERS) for form in raw)


def _load(
    lib: Any, gguf: Gguf, tokens: list[bytes], types: NDArray[np.int32], merges: list[bytes]
) -> Any:
    strings = {"general.architecture": gguf.arch, f"{_KEY}model": _MODEL}
    if isinstance(kind := gguf.metadata.get(f"{_KEY}pre"), str):
        strings[f"{_KEY}pre"] = kind
    entries = [
        _string(key) + struct.pack("<I", 8) + _string(value) for key, value in strings.items()
    ]
    entries += [_array(f"{_KEY}tokens", tokens), _array(f"{_KEY}merges", merges)]
    head = struct.pack("<IIQ", 9, 5, len(types))
    entries.append(_string(f"{_KEY}token_type") + head + types.tobytes())
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
    # In memory: what somebody said has no business in a file.
    with os.fdopen(os.memfd_create("excerpt.gguf"), "wb") as file:
        file.write(data)
        file.flush()
        return load_vocabulary(lib, Path(f"/proc/self/fd/{file.fileno()}"))


def _string(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _array(key: str, values: list[bytes]) -> bytes:
    packed = b"".join(map(_string, values))
    return _string(key) + struct.pack("<IIQ", 9, 8, len(values)) + packed
