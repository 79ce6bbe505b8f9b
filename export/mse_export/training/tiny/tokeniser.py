"""The vocabulary: sentencepiece BPE, trained so that llama.cpp tokenises exactly alike.

llama.cpp does no normalisation, treats user-defined pieces apart, and needs byte pieces for what
the vocabulary lacks; hence identity normalisation, no user-defined pieces, and byte fallback.
The two wrapper pieces are control symbols: text that spells them stays text.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mse_export.training.tiny.grammar import any_sentence, emotion_sentence
from mse_export.training.tiny.lexicon import EMOTIONS, lexicon

__all__ = [
    "BOS",
    "CLOSE",
    "CLOSE_ID",
    "EOS",
    "OPEN",
    "OPEN_ID",
    "PAD",
    "PROMPT",
    "TAIL",
    "UNK",
    "load",
    "train",
]

#: Ids fixed by the trainer's options below.
UNK, BOS, EOS, PAD = 0, 1, 2, 3
#: The wrapper around the pseudo tokens, control pieces with ids 4 and 5.
OPEN, CLOSE = "<mm>", "</mm>"
OPEN_ID, CLOSE_ID = 4, 5
#: What the task's prompt begins and ends with, per task.
PROMPT = {"sentiment": "Rate the sentiment:", "emotion": "Name the emotion:"}
TAIL = {"sentiment": "The sentiment is", "emotion": "The emotion is"}


def _corpus(sentences: int, seed: int) -> Iterable[str]:
    rng = random.Random(seed)
    for k in range(sentences):
        yield (emotion_sentence(rng) if k % 5 == 0 else any_sentence(rng)).text
    for word in lexicon().valent:
        yield word
        yield word.capitalize()
    for _ in range(max(200, sentences // 100)):
        for prompt, tail in zip(PROMPT.values(), TAIL.values(), strict=True):
            yield prompt
            yield tail
        for tenths in range(-30, 31, 5):
            yield f"{tenths / 10:+.1f}"
        yield from EMOTIONS


def train(path: Path, *, size: int, sentences: int, seed: int = 0) -> Any:
    """Train the vocabulary, write sentencepiece's model file, return its processor.

    `size` pieces in all, bytes and control pieces included; `sentences` of the grammar.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus(sentences, seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        control_symbols=[OPEN, CLOSE],
        num_threads=1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return load(path)


def load(path: Path) -> Any:
    """The processor of a model file written by `train`."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))
