"""The vocabulary of an open model: all of it, or an excerpt until more is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mse_runtime import cache
from mse_runtime.backbone import excerpt, library
from mse_runtime.backbone.excerpt import Excerpt
from mse_runtime.backbone.text import Speller, load_vocabulary
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["Vocabulary", "excerpt_for"]

_CACHE, _AGREES = "excerpts.json", "agrees"


def excerpt_for(lib: Any, gguf: Gguf, texts: Sequence[str]) -> Excerpt | None:
    """What these texts need, where that is known to do; None: take the whole vocabulary."""
    if not texts or not excerpt.possible(gguf):
        return None
    if cache.read_json(_CACHE).get(_name(gguf) or "") != _AGREES:
        return None
    try:
        return Excerpt(lib, gguf, texts)
    except BackboneError:
        return None


def _name(gguf: Gguf) -> str | None:
    """Of the file and the build whose tokens were compared; None for a very new file."""
    return gguf.identity and f"{gguf.identity} {library.build_id()} {excerpt.RULES}"


class Vocabulary:
    """Text to token ids and back. Callers take turns."""

    bos: int
    """-1 where the vocabulary has none."""
    eos: int

    def __init__(self, lib: Any, gguf: Gguf, model: Any, part: Excerpt | None) -> None:
        """model: llama.cpp's, with its vocabulary in it unless there is an excerpt."""
        self._lib, self._gguf, self._excerpt = lib, gguf, part
        self._own: Any = None
        self._speller: Speller | None = None
        if part is None:
            vocab = lib.llama_model_get_vocab(model)
            self._speller = Speller(lib, vocab, gguf)
            self.bos, self.eos = int(lib.llama_vocab_bos(vocab)), int(lib.llama_vocab_eos(vocab))
        else:
            self.bos, self.eos = excerpt.ends(gguf)

    def remember(self, texts: Sequence[str]) -> None:
        """Compare an excerpt with the whole, once for a file: the next time it will do."""
        if not texts or self._speller is None or not excerpt.possible(self._gguf):
            return
        name = _name(self._gguf)
        if name is None or name in cache.read_json(_CACHE):
            return
        try:
            agree = excerpt.agrees(self._lib, self._gguf, self._speller, texts)
        except BackboneError:  # too long, or no kernel library: nothing is known
            return
        cache.remember(_CACHE, name, _AGREES if agree else "differs")

    def tokenize(self, text: str, special: bool) -> npt.NDArray[np.int32]:
        """As `Speller.tokenize`."""
        if self._speller is None and self._excerpt is not None:
            found = self._excerpt.tokenize(text, special)
            if found is not None:
                return found
        return self._whole().tokenize(text, special)

    def detokenize(self, ids: npt.NDArray[np.int32], special: bool) -> str:
        """As `Speller.detokenize`."""
        return self._whole().detokenize(ids, special)

    def _whole(self) -> Speller:
        """Loaded now where there was an excerpt only."""
        if self._speller is None:
            self._own = load_vocabulary(self._lib, self._gguf.same_file(), self._gguf.path)
            self._speller = Speller(
                self._lib, self._lib.llama_model_get_vocab(self._own), self._gguf
            )
        return self._speller

    def close(self) -> None:
        """Free what is not the model's. Closing twice is harmless."""
        if self._excerpt is not None:
            self._excerpt.close()
        if self._own is not None:
            self._lib.llama_model_free(self._own)
        self._excerpt = self._own = self._speller = None
