"""The backbone's tokeniser as prompts and labels need it, without any remote code.

`tokenize(text, bos, special)` is the runtime's own protocol (`mse_runtime.prompt.Tokenizer`), so
that a prompt is built by the same code in training and at run time. By default spellings of
special tokens in a text stay text.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import BackboneError
from mse_runtime.prompt import Tokenizer

__all__ = ["open_tokenizer"]

Ids = NDArray[np.int32]

# Published-model spec, section 3.3 and the tokeniser's own list: ids follow the sentencepiece ones.
CHATGLM_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
# Qwen's pre-tokeniser and specials: part of its published tokeniser's definition.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_EXTRAS = 205


def open_tokenizer(folder: Path, model_type: str) -> Tokenizer:
    """The tokeniser of the Hugging Face folder `folder`; BackboneError says what is missing."""
    if model_type == "chatglm":
        return SentencePiece(folder / "tokenizer.model")
    if model_type == "qwen":
        return Tiktoken(folder / "qwen.tiktoken")
    return HuggingFace(folder)


class HuggingFace:
    """Any tokeniser that transformers opens without remote code."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackboneError(
                f"{folder} has no tokeniser that can be opened ({type(error).__name__}: {error}). "
                "Download the whole repository, tokenizer files included."
            ) from error
        self._bos = self._tokenizer.bos_token_id

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> Ids:
        ids = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not special, verbose=False
        )["input_ids"]
        if bos:
            if self._bos is None:
                raise BackboneError(
                    "The prompt asks for a BOS token and this tokeniser has none. Use a layout "
                    "without one (--layout pseudo-last)."
                )
            ids = [self._bos, *ids]
        return np.array(ids, np.int32)


class SentencePiece:
    """ChatGLM3: a sentencepiece model and five special tokens behind it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        if not path.is_file():
            raise BackboneError(f"{path} is missing. Download the whole repository.")
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        first = self._model.vocab_size()
        self._specials = {text: first + i for i, text in enumerate(CHATGLM_SPECIALS)}
        self._split = re.compile("|".join(re.escape(text) for text in CHATGLM_SPECIALS))

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> Ids:
        ids = [int(self._model.bos_id())] if bos else []
        if not special:
            return np.array(ids + self._model.encode(text), np.int32)
        at = 0
        for found in self._split.finditer(text):
            if found.start() > at:
                ids += self._model.encode(text[at : found.start()])
            ids.append(self._specials[found.group()])
            at = found.end()
        if at < len(text):
            ids += self._model.encode(text[at:])
        return np.array(ids, np.int32)


class Tiktoken:
    """Qwen (the first): byte-pair ranks in a text file, NFC before anything else."""

    def __init__(self, path: Path) -> None:
        import tiktoken

        try:
            lines = path.read_bytes().splitlines()
            ranks = {base64.b64decode(a): int(b) for a, b in (x.split() for x in lines if x)}
        except (OSError, ValueError) as error:
            raise BackboneError(
                f"{path} cannot be read as Qwen's vocabulary ({error}). Download the repository."
            ) from error
        extras = tuple(f"<|extra_{i}|>" for i in range(QWEN_EXTRAS))
        specials = {text: len(ranks) + i for i, text in enumerate(QWEN_SPECIALS + extras)}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self._bos = specials["<|im_start|>"]

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> Ids:
        import unicodedata

        text = unicodedata.normalize("NFC", text)
        ids = self._encoding.encode(
            text, allowed_special="all" if special else set(), disallowed_special=()
        )
        return np.array([self._bos, *ids] if bos else ids, np.int32)
