"""Byte-level BPE vocabularies from `tokenizer.json` (Qwen 2, Llama 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mse_export.vocab import Kind, Vocabulary
from mse_runtime.errors import BackboneError

__all__ = ["PRE_TOKENIZERS", "bpe_vocabulary"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}": "qwen2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}": "llama-bpe",
}
"""The splitting regular expression -> llama.cpp's name for it."""


def bpe_vocabulary(folder: Path, size: int, config: dict[str, Any]) -> Vocabulary:
    """`tokenizer.json` as a vocabulary of `size` tokens.

    config: the folder's config.json, for the ids of BOS and EOS.
    """
    path = folder / "tokenizer.json"
    try:
        data = json.loads(path.read_text("utf-8"))
        model = data["model"]
        vocabulary, merges = model["vocab"], model["merges"]
    except FileNotFoundError as error:
        raise BackboneError(
            f"{folder} has no tokenizer.json. Download the tokeniser files into the folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{path} is not a BPE tokeniser. Download it again.") from error
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [Kind.UNUSED] * size
    for token, index in vocabulary.items():
        _place(path, tokens, types, token, int(index), Kind.NORMAL)
    added = {}
    for entry in data.get("added_tokens", []):
        kind = Kind.CONTROL if entry.get("special") else Kind.USER_DEFINED
        _place(path, tokens, types, entry["content"], int(entry["id"]), kind)
        added[entry["content"]] = int(entry["id"])
    special = {
        role: index
        for role, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"))
        if (index := _first(config.get(name))) is not None and index < size
    }
    pad = _first(config.get("pad_token_id"))
    if pad is None:
        pad = added.get("<|endoftext|>", special.get("eos"))
    if pad is not None:
        special["padding"] = pad
    return Vocabulary(
        model="gpt2",
        pre=_pre_tokenizer(path, data),
        tokens=[token.encode() for token in tokens],
        types=[int(kind) for kind in types],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        special=special,
    )


def _first(value: Any) -> int | None:
    """An id that may be given as a list of alternatives."""
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else int(value)


def _place(
    path: Path, tokens: list[str], types: list[Kind], token: str, index: int, kind: Kind
) -> None:
    if not 0 <= index < len(tokens):
        raise BackboneError(
            f"{path}: token {token!r} has the id {index}, but config.json gives a vocabulary of "
            f"{len(tokens)}. Tokeniser and model do not belong together."
        )
    tokens[index], types[index] = token, kind


def _pre_tokenizer(path: Path, data: dict[str, Any]) -> str:
    """llama.cpp's name of the splitting expression; an unknown one would split text wrongly."""
    steps = data.get("pre_tokenizer") or {}
    patterns = [
        step["pattern"].get("Regex")
        for step in steps.get("pretokenizers", [steps])
        if step.get("type") == "Split"
    ]
    if len(patterns) == 1 and patterns[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[patterns[0]]
    raise BackboneError(
        f"{path} splits text with an expression that this converter does not know "
        f"({patterns or steps.get('type')}). Convert the model with llama.cpp's own tools and give "
        "the result: mse-export --backbone FILE.gguf"
    )
