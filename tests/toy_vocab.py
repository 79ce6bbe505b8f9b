"""Two small, working vocabularies: one of SentencePiece's kind, one of byte-level BPE's.

Both are learned here from a page of text, so that merges, byte fallback, the dummy space and
special tokens behave as in the real ones.
"""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass, field

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

CORPUS = """
Please give the sentiment of the clip as a number from -3.0 to +3.0 in steps of 0.1 .
Please give the emotion of this clip : neutral , surprise , fear , sadness , joy , disgust , anger
the film was great and I loved every minute of it , what a surprise . I am so happy for you .
this is the worst thing that has ever happened to me , I hate it and I will not come back .
once upon a time there was a little girl named Lily who liked to play outside in the park .
it was not bad at all , but it could have been a lot better if they had listened to us .
-1.2 +0.4 +2.8 -0.6 0.0 1 2 3 4 5 6 7 8 9 10 +1.0 -2.5 +3.0 -3.0 <Multimodal> </Multimodal>
"""


@dataclass
class Vocab:
    """What goes into `tokenizer.ggml.*`."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    add_space_prefix: bool | None = None


def learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Plain BPE: the most frequent pair of neighbours, `count` times; ties by spelling."""
    table = [(tuple(word), n) for word, n in collections.Counter(words).items()]
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for parts, n in table:
            for pair in itertools.pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        table = [(_merged(parts, best), n) for parts, n in table]
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def spm(extra: tuple[str, ...] = (), pieces: tuple[str, ...] = ()) -> Vocab:
    """SentencePiece's kind: <unk> <s> </s>, 256 bytes, characters, merges; `extra` are controls."""
    words = ["▁" + word for word in CORPUS.split()]
    merges = [a + b for a, b in learn_merges(words, 160)]
    chars = sorted(set("".join(words)) | {chr(c) for c in range(33, 127)})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    scores = [0.0] * len(tokens)
    learned = [piece for piece in (*merges, *chars, *pieces) if piece not in tokens]
    learned = list(dict.fromkeys(learned))
    tokens += learned
    types += [NORMAL] * len(learned)
    scores += [-float(rank) for rank in range(len(learned))]
    tokens += extra
    types += [CONTROL] * len(extra)
    scores += [0.0] * len(extra)
    return Vocab(
        "llama", "default", tokens, types, scores, special={"bos": 1, "eos": 2, "unknown": 0}
    )


def chatglm() -> Vocab:
    """ChatGLM3's kind: SentencePiece with its controls at the end and no BOS added."""
    vocab = spm(("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>"))
    vocab.pre = "chatglm-spm"
    return vocab


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in table):
        table[byte] = chr(256 + offset)
    return table


def bpe() -> Vocab:
    """Byte-level BPE as Qwen's: 256 bytes, merges, three controls, no BOS."""
    table = byte_alphabet()
    spelled = ["".join(table[b] for b in f" {word}".encode()) for word in CORPUS.split()]
    merges = learn_merges(spelled, 200)
    tokens = [table[byte] for byte in range(256)]
    tokens += list(dict.fromkeys(a + b for a, b in merges))
    types = [NORMAL] * len(tokens)
    first = len(tokens)
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types += [CONTROL] * 3
    return Vocab(
        "gpt2", "qwen2", tokens, types, merges=[f"{a} {b}" for a, b in merges],
        special={"eos": first, "bos": first},
    )  # fmt: skip
