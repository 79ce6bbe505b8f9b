"""The part of a vocabulary that a few texts need: llama.cpp takes 0.2 s for 150,000 tokens.

A byte-pair tokenizer looks up tokens that stand in the text, and merges whose result does (Sennrich
et al. 2016); special tokens are looked for everywhere. A vocabulary of those alone, in the same
order, gives the same tokens, by llama.cpp's own tokenizer. Finding them takes a few milliseconds
(`mse_kernels.strings`). `agrees` compares both on samples before excerpts of a file are used.

llama.cpp guesses what some special tokens are from their spelling and from metadata. So an excerpt
has the metadata too, and a transcript that spells a special token takes the whole vocabulary.
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

__all__ = ["KEY", "RULES", "Excerpt", "agrees", "ends", "possible"]

RULES = 1
"""Of what is in an excerpt: another number where that changes."""

KEY = "tokenizer.ggml."
"""What all of a vocabulary's metadata begin with."""

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
        # Where a file that is open can be opened again, whatever its name, and needs none.
        sys.platform == "linux"
        and hasattr(os, "memfd_create")
        and gguf.arch in ARCHITECTURES
        and gguf.metadata.get(f"{KEY}model") == _MODEL
        and gguf.array_length(f"{KEY}tokens") >= _WORTH
        and gguf.array_length(f"{KEY}tokens") == gguf.n_vocab
        and gguf.array_length(f"{KEY}token_type") == gguf.n_vocab
        and all(0 <= token < gguf.n_vocab for token in ends(gguf))
    )


def ends(gguf: Gguf) -> tuple[int, int]:
    """BOS and EOS as the file names them; -1 where it does not, and llama.cpp has its own idea."""
    bos, eos = (gguf.metadata.get(f"{KEY}{name}_token_id") for name in ("bos", "eos"))
    return bos if isinstance(bos, int) else -1, eos if isinstance(eos, int) else -1


class Excerpt:
    """What `texts` need of a vocabulary, as llama.cpp loads it. Close it."""

    def __init__(self, lib: Any, gguf: Gguf, texts: Iterable[str]) -> None:
        """Raises BackboneError where none can be made: no kernel library, too much text."""
        self._lib, self._model = lib, None
        # Composed as well: a bundle may want transcripts so.
        self._texts = {text for one in texts for text in (one, unicodedata.normalize("NFC", one))}
        raw = [text.encode("utf-8", errors="replace") for text in self._texts]
        spelled = _END.join(one.decode("latin-1").translate(_LETTERS) for one in raw).encode()
        if len(spelled) > _MOST_TEXT:
            raise BackboneError(f"{len(spelled)} bytes of text are too much for an excerpt.")
        types = gguf.numbers(f"{KEY}token_type")
        always = types != _NORMAL
        always[:_FIRST] = True
        named = _named(gguf)
        always[list(named.values())] = True
        # Special tokens are looked for as they are, others in the letters for bytes.
        within = _END.encode().join((spelled, *raw))
        tokens = gguf.strings_within(f"{KEY}tokens", within, always=always)
        merges = gguf.strings_within(f"{KEY}merges", spelled, pairs=True)
        self._ids = np.array([number for number, _ in tokens], np.int32)
        said = _END.encode().join(raw)
        self._special = [
            text.decode(errors="replace")
            for number, text in tokens
            if types[number] != _NORMAL and text and text in said
        ]
        self._model = _load(
            lib, gguf, [text for _, text in tokens], types[self._ids].astype("<i4"),
            [merge for _, merge in merges],
            {key: int(np.searchsorted(self._ids, number)) for key, number in named.items()},
        )  # fmt: skip
        self._speller = Speller(lib, lib.llama_model_get_vocab(self._model), gguf)

    def covers(self, text: str, special: bool) -> bool:
        """Whether it does for this text."""
        if not isinstance(text, str) or not any(text in known for known in self._texts):
            return False
        return special or not any(one in text for one in self._special)

    def tokenize(self, text: str, special: bool) -> NDArray[np.int32] | None:
        """As `Speller.tokenize`; None for a text that takes the whole vocabulary."""
        if not self.covers(text, special):
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
    for wanted in (*([sample] for sample in _SAMPLES), list(texts)):
        excerpt = Excerpt(lib, gguf, wanted)
        try:
            for text in wanted:
                for special in (False, True):
                    found = excerpt.tokenize(text, special)
                    expected = whole.tokenize(text, special)
                    if found is not None and not np.array_equal(found, expected):
                        return False
        finally:
            excerpt.close()
    return True


def _named(gguf: Gguf) -> dict[str, int]:
    """The special ids that the metadata name."""
    count = gguf.array_length(f"{KEY}tokens")
    return {
        key: value
        for key, value in gguf.metadata.items()
        if key.startswith(KEY) and key.endswith("_token_id")
        and isinstance(value, int) and 0 <= value < count
    }  # fmt: skip


def _load(
    lib: Any, gguf: Gguf, tokens: list[bytes], types: NDArray[np.int32], merges: list[bytes],
    named: dict[str, int],
) -> Any:  # fmt: skip
    strings = {"general.architecture": gguf.arch, f"{KEY}model": _MODEL}
    for key in ("general.name", f"{KEY}pre"):
        if isinstance(value := gguf.metadata.get(key), str):
            strings[key] = value
    entries = [
        _string(key) + struct.pack("<I", 8) + _string(value) for key, value in strings.items()
    ]
    entries += [_string(key) + struct.pack("<II", 4, number) for key, number in named.items()]
    entries += [_array(f"{KEY}tokens", tokens), _array(f"{KEY}merges", merges)]
    head = struct.pack("<IIQ", 9, 5, len(types))
    entries.append(_string(f"{KEY}token_type") + head + types.tobytes())
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
    try:  # in memory: what somebody said has no business in a file
        with os.fdopen(os.memfd_create("excerpt.gguf"), "wb") as file:
            file.write(data)
            file.flush()
            return load_vocabulary(lib, Path(f"/proc/self/fd/{file.fileno()}"), gguf.path)
    except OSError as error:
        raise BackboneError(f"An excerpt of a vocabulary cannot be made here: {error}.") from error


def _string(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _array(key: str, values: list[bytes]) -> bytes:
    packed = b"".join(map(_string, values))
    return _string(key) + struct.pack("<IIQ", 9, 8, len(values)) + packed
