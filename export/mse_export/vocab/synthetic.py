"""Made-up vocabularies of real size, for synthetic backbones.

Common words are whole tokens, so that a sentence has about as many tokens as with the real
tokeniser; everything else falls back to short pieces, characters and bytes. No token is taken
from any model's vocabulary.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from importlib.resources import files
from itertools import product

from mse_export.vocab import Kind, Vocabulary

__all__ = ["bpe", "sentencepiece"]

SPACE = "▁"


def _words() -> list[str]:
    """Everyday words and those of the prompts (words.txt)."""
    return files("mse_export.vocab").joinpath("words.txt").read_text("utf-8").split()


def _generated(alphabet: str, prefix: str, lengths: range) -> Iterator[str]:
    """Every string over `alphabet` by length; each one's prefix comes before it."""
    for length in lengths:
        for letters in product(alphabet, repeat=length):
            yield prefix + "".join(letters)


def _pieces(space: str, count: int, singles: set[str]) -> list[str]:
    """`count` distinct multi-character pieces, each one a known piece plus one character."""
    pieces: dict[str, None] = {}
    # As trained vocabularies have them. With SentencePiece a text of its own begins with a space:
    # without these ":" and "+1.5" would each take a token more than they do.
    for mark in string.punctuation:
        pieces[space + mark] = None
    for word in _words():
        text = space + word
        for end in range(2, len(text) + 1):
            pieces[text[:end]] = None
    letters = string.ascii_lowercase
    for size in range(2, 6):
        for prefix, length in ((space, size - 1), ("", size)):
            for piece in _generated(letters, prefix, range(length, length + 1)):
                if len(pieces) >= count:
                    return list(pieces)[:count]
                if piece not in singles:
                    pieces[piece] = None
    return list(pieces)[:count]


def sentencepiece(
    size: int, extra: dict[str, int] | None = None, unused_tail: int = 0, add_bos: bool = True
) -> Vocabulary:
    """`size` tokens: <unk>, <s>, </s>, 256 bytes, pieces with falling scores, then characters.

    extra: control tokens at fixed ids at the end (ChatGLM3's [gMASK] and so on).
    """
    extra = extra or {}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256]
    characters = [SPACE, *(c for c in map(chr, range(33, 127)))]
    characters += [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    characters += list("，。！？：；、（）《》")
    body = size - len(tokens) - len(extra) - unused_tail
    characters = characters[:body]
    pieces = _pieces(SPACE, body - len(characters), {*characters, *extra})
    tokens += pieces + characters
    types += [Kind.NORMAL] * (len(pieces) + len(characters))
    while len(tokens) < size - len(extra) - unused_tail:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(Kind.UNUSED)
    for name, index in sorted(extra.items(), key=lambda item: item[1]):
        if index != len(tokens):
            raise ValueError(f"{name} would land on id {len(tokens)}, not {index}")
        tokens.append(name)
        types.append(Kind.CONTROL)
    while len(tokens) < size:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(Kind.UNUSED)
    scores = [0.0 if kind != Kind.NORMAL else -float(i) for i, kind in enumerate(types)]
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[token.encode() for token in tokens],
        types=[int(kind) for kind in types],
        scores=scores,
        special={"bos": 1, "eos": 2, "unknown": 0},
        add_bos=add_bos,
    )


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    spare = (chr(256 + i) for i in range(256))
    for byte in range(256):
        if byte not in table:
            table[byte] = next(spare)
    return table


def bpe(size: int, special: dict[str, int], pre: str, roles: dict[str, int]) -> Vocabulary:
    """`size` byte-level BPE tokens with merges; `special` are control tokens by id."""
    alphabet = byte_alphabet()
    tokens = [alphabet[byte] for byte in range(256)]
    space = alphabet[ord(" ")]
    first_special = min(special.values())
    pieces = _pieces(space, first_special - 256, set(tokens))
    tokens += pieces
    merges = [f"{piece[:-1]} {piece[-1]}" for piece in pieces]
    types = [Kind.NORMAL] * len(tokens)
    names = {index: name for name, index in special.items()}
    for index in range(len(tokens), size):
        name = names.get(index)
        tokens.append(name or f"[PAD{index}]")
        types.append(Kind.CONTROL if name else Kind.UNUSED)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=[token.encode() for token in tokens],
        types=[int(kind) for kind in types],
        merges=merges,
        special=roles,
    )
