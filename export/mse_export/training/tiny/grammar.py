"""Sentences from frames and word salads, with their valence and the emotion their words carry.

The surface varies as typed text does: sentence case or none, curly apostrophes, shouting,
missing or repeated punctuation. The language model sees what users type, unchanged.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mse_export.training.tiny.lexicon import EMOTIONS, lexicon, vader

__all__ = ["Sentence", "any_sentence", "clip_sentence", "emotion_sentence", "neutral_sentence"]

_ONSETS = [
    "b",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "w",
    "z",
    "st",
    "tr",
    "bl",
    "ch",
    "sh",
    "th",
]
_VOWELS = ["a", "e", "i", "o", "u", "ee", "ou", "ai"]
_CODAS = ["", "n", "r", "l", "s", "t", "ck"]
_ODD = [
    "é",
    "ü",
    "ñ",
    "ç",
    "—",
    "–",
    "…",
    "♪",
    "😀",
    "😢",
    "#",
    "&",
    "*",
    "/",
    "(",
    ")",
    ":",
    ";",
    "$",
    "%",
    "@",
]


@dataclass(frozen=True)
class Sentence:
    """A drawn sentence."""

    text: str
    valence: float
    """VADER's value on -3..+3."""
    emotion: int | None
    """Index into `EMOTIONS`, or None where the words carry valence and no single emotion."""


def _neutral(rng: random.Random) -> str:
    words = lexicon()
    x = rng.random()
    if x < 0.42:
        return rng.choice(words.function)
    if x < 0.47:
        return rng.choice(words.names).capitalize()
    if x < 0.95:
        return rng.choice(words.neutral)
    if x < 0.96:
        return str(rng.randint(0, 2030))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.randint(1, 3))
    )


def _valent(rng: random.Random) -> str:
    words = lexicon()
    word = rng.choice(words.common if rng.random() < 0.5 else words.valent)
    x = rng.random()
    if x < 0.15:
        return f"{rng.choice(words.boosters)} {word}"
    if x < 0.30:
        return f"{rng.choice(words.negations)} {word}"
    if x < 0.36:
        return f"{rng.choice(words.negations)} {rng.choice(words.boosters)} {word}"
    return word


def _fill(rng: random.Random, frame: str, emotion: int = 0) -> str:
    words = lexicon()
    out = []
    for slot in frame.split():
        if slot == "S":
            out.append(_valent(rng))
        elif slot == "E":
            out.append(rng.choice(words.emotion[emotion]))
        elif slot == "N":
            out.append(_neutral(rng))
        elif slot == "T":
            out.append(rng.choice(words.nouns) if rng.random() < 0.85 else _neutral(rng))
        elif slot == "V":
            out.append(rng.choice(words.verbs))
        else:
            out.append(slot)
    return " ".join(out)


def _salad(rng: random.Random, valent: tuple[int, ...]) -> str:
    out = [_neutral(rng) for _ in range(rng.randint(1, 12))]
    for _ in range(rng.choice(valent)):
        out.insert(rng.randint(0, len(out)), _valent(rng))
    return " ".join(out)


def _surface(rng: random.Random, text: str, end: str) -> str:
    if rng.random() < 0.65:
        text = " ".join(
            "I" + w[1:] if w == "i" or w.startswith("i'") else w for w in text.split(" ")
        )
        text = text[:1].upper() + text[1:]
    x = rng.random()
    if x < 0.02:
        text = text.upper()
    elif x < 0.05:
        parts = text.split(" ")
        k = rng.randrange(len(parts))
        parts[k] = parts[k].upper()
        text = " ".join(parts)
    if rng.random() < 0.25:
        text = text.replace("'", "’")
    text += end
    if rng.random() < 0.015:
        k = rng.randint(0, len(text))
        text = text[:k] + rng.choice(_ODD) + text[k:]
    return text


def _ending(rng: random.Random) -> str:
    return rng.choices([".", "!", "?", "!!", "...", "", " !", "?!"], [42, 16, 14, 3, 4, 19, 1, 1])[
        0
    ]


def _make(rng: random.Random, text: str, emotion: int | None) -> Sentence:
    surface = _surface(rng, text, _ending(rng))
    return Sentence(surface, vader().score(surface), emotion)


def any_sentence(rng: random.Random) -> Sentence:
    """A sentence of any kind; about half of them are neutral."""
    frames = lexicon().frames
    if rng.random() < 0.30:
        return neutral_sentence(rng)

    def clause() -> str:
        if rng.random() < 0.6:
            return _fill(rng, rng.choice(frames["any"]))
        return _salad(rng, (0, 0, 1, 1, 1, 2, 2, 3))

    text = clause()
    x = rng.random()
    if x < 0.12:
        text += " but " + clause()
    elif x < 0.32:
        text += rng.choice([", ", ". ", "! ", "? ", " and "]) + clause()
    sentence = _make(rng, text, None)
    return Sentence(sentence.text, sentence.valence, _emotion_of_words(sentence))


def neutral_sentence(rng: random.Random) -> Sentence:
    """A sentence without valence or emotion words."""
    frames = lexicon().frames["neutral"]
    while True:
        text = _fill(rng, rng.choice(frames)) if rng.random() < 0.6 else _salad(rng, (0,))
        if rng.random() < 0.2:
            text += rng.choice([", ", ". ", "? "]) + _fill(rng, rng.choice(frames))
        sentence = _make(rng, text, 0)
        if abs(sentence.valence) < 0.15:
            return sentence


def emotion_sentence(rng: random.Random, emotion: int | None = None) -> Sentence:
    """A sentence whose words carry one emotion (drawn uniformly, or the one asked for)."""
    chosen = rng.randrange(len(EMOTIONS)) if emotion is None else emotion
    if chosen == 0:
        return neutral_sentence(rng)
    text = _fill(rng, rng.choice(lexicon().frames["emotion"]), chosen)
    if rng.random() < 0.25:
        tail = _fill(rng, rng.choice(lexicon().frames["neutral"]))
        text = f"{text}. {tail}" if rng.random() < 0.6 else f"{tail}. {text}"
    return _make(rng, text, chosen)


def clip_sentence(rng: random.Random, *, max_words: int = 12) -> Sentence:
    """A sentence for a synthetic actor to say: any kind, short enough for six seconds."""
    while True:
        x = rng.random()
        sentence = (
            emotion_sentence(rng)
            if x < 0.60
            else neutral_sentence(rng)
            if x < 0.66
            else any_sentence(rng)
        )
        if 2 <= len(sentence.text.split()) <= max_words:
            return sentence


def _emotion_of_words(sentence: Sentence) -> int | None:
    """Emotion of a sentence of mixed words: the one list it draws from, if it is one."""
    found = set()
    plain = "".join(c if c.isalpha() or c == "-" else " " for c in sentence.text.lower())
    tokens = plain.split()
    for index, group in enumerate(lexicon().emotion):
        if any(w in group for w in tokens):
            found.add(index)
    if len(found) == 1:
        emotion = found.pop()
        # Words of an emotion under a negation or a counterweight carry it no longer.
        sign = 1 if emotion == 4 else 0 if emotion == 1 else -1
        return emotion if sign * sentence.valence >= 0 else None
    if not found and abs(sentence.valence) < 0.15:
        return 0
    if not found and sentence.valence > 1.0:
        return 4
    return None
