"""Qwen's tiktoken file (first generation): ranks become merges.

Each line is a base64 token and its rank. llama.cpp wants merges: a token's merge is the last pair
that joins when only lower ranks may be used.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from mse_export.vocab import Kind, Vocabulary
from mse_export.vocab.synthetic import byte_alphabet
from mse_runtime.errors import BackboneError

__all__ = ["qwen_special_tokens", "read_ranks", "tiktoken_vocabulary"]

EXTRA_TOKENS = 205


def qwen_special_tokens(first: int) -> dict[str, int]:
    """Qwen's control tokens from the first id after the ranks."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|extra_{i}|>" for i in range(EXTRA_TOKENS)]
    return {name: first + i for i, name in enumerate(names)}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, from a `.tiktoken` file."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise BackboneError(f"{path} is not a tiktoken vocabulary. Download it again.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise BackboneError(f"{path} is cut off or has gaps in its ranks. Download it again.")
    return ranks


def tiktoken_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The folder's `*.tiktoken` as a vocabulary of `size` tokens."""
    found = sorted(folder.glob("*.tiktoken"))
    if not found:
        raise BackboneError(
            f"{folder} has no .tiktoken file (qwen.tiktoken). Download the tokeniser files."
        )
    ranks = read_ranks(found[0])
    alphabet = byte_alphabet()
    control = {name: i for name, i in qwen_special_tokens(len(ranks)).items() if i < size}
    if len(control) < 3:
        raise BackboneError(
            f"{found[0]} has {len(ranks)} tokens, but config.json gives a vocabulary of {size}. "
            "Tokeniser and model do not belong together."
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [Kind.UNUSED] * size
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        tokens[rank], types[rank] = _spelled(token, alphabet), Kind.NORMAL
        if len(token) > 1:
            left, right = _last_merge(ranks, token, rank)
            merges.append(f"{_spelled(left, alphabet)} {_spelled(right, alphabet)}")
    for name, index in control.items():
        tokens[index], types[index] = name, Kind.CONTROL
    end = control["<|endoftext|>"]
    return Vocabulary(
        model="gpt2",
        pre="qwen2",
        tokens=[token.encode() for token in tokens],
        types=[int(kind) for kind in types],
        merges=merges,
        special={"bos": end, "eos": end, "padding": end},
    )


def _spelled(token: bytes, alphabet: Mapping[int, str]) -> str:
    return "".join(alphabet[byte] for byte in token)


def _last_merge(ranks: Mapping[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    """The two parts that remain when `token` is built from lower ranks only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = rank, -1
        for i in range(len(parts) - 1):
            joined = ranks.get(parts[i] + parts[i + 1], rank)
            if joined < best:
                best, at = joined, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) != 2:
        raise BackboneError(
            f"The tiktoken vocabulary's token {token!r} cannot be built from two earlier ones, so "
            "it is not a byte-pair vocabulary. Download it again."
        )
    return parts[0], parts[1]
