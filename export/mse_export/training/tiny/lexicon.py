"""Words: the VADER lexicon (MIT) for valence, and this project's own lists for everything else.

A word of the neutral lists that VADER scores is dropped, so that a neutral sentence is neutral
by the label's own measure.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import re
import tomllib
from dataclasses import dataclass
from typing import Any

__all__ = ["EMOTIONS", "Lexicon", "Vader", "lexicon", "vader"]

#: Order of the emotion labels everywhere in this folder (MELD's order).
EMOTIONS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")

_BOOSTERS = (
    "very really so extremely totally absolutely incredibly completely quite pretty kinda "
    "slightly somewhat barely almost fairly just truly too"
)
_NEGATIONS = (
    "not never don't didn't isn't wasn't can't won't doesn't without nothing aren't couldn't "
    "wouldn't hardly ain't"
)


class Vader:
    """VADER's rules over its lexicon; `score` is its compound value on the -3..+3 scale."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer: Any = SentimentIntensityAnalyzer()
        self.valence: dict[str, float] = {
            word: float(value)
            for word, value in self._analyzer.lexicon.items()
            if re.fullmatch(r"[a-z]{2,}", word)
        }

    def score(self, text: str) -> float:
        """Valence of a sentence on -3..+3 (VADER's compound, -1..+1, times three)."""
        return 3.0 * float(self._analyzer.polarity_scores(text.replace("’", "'"))["compound"])


@functools.cache
def vader() -> Vader:
    """The one VADER analyser of the process (its lexicon takes 30 ms to read)."""
    return Vader()


@dataclass(frozen=True)
class Lexicon:
    """The lists a sentence is drawn from."""

    neutral: tuple[str, ...]
    """Every neutral surface form."""
    function: tuple[str, ...]
    """Function words, contractions and fillers: what spoken sentences are mostly made of."""
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    names: tuple[str, ...]
    valent: tuple[str, ...]
    """VADER's words, sorted."""
    common: tuple[str, ...]
    """Valent words that are also frequent in speech (the emotion lists' and a few more)."""
    boosters: tuple[str, ...]
    negations: tuple[str, ...]
    emotion: tuple[tuple[str, ...], ...]
    """Per label of `EMOTIONS`; the first (neutral) is empty."""
    frames: dict[str, tuple[str, ...]]


_COMMON = """
good great bad nice love hate happy sad sorry thanks thank please okay ok yeah yes no wow fun funny
beautiful pretty cute cool crazy weird awful terrible horrible amazing awesome perfect wonderful
fine sure best better worst worse wrong problem problems stupid dumb idiot kill killed dead die
died death hurt pain sick scared afraid worried angry mad upset mean cry crying lost lose loser
miss fight hell damn god lucky luck hope wish kiss hug friend friends party gift special sweet kind
care glad proud excited interested interesting important easy strong smart brilliant clean fresh
free safe save help helped like liked likes loved loves loving enjoy enjoyed win won winner joke
laugh smile alone lonely tired bored boring ugly poor broke broken hard lie lied liar cheat guilty
shame embarrassed nervous hates kidding serious seriously relax calm trust welcome wins agree
accept alright admit ass bastard bitch shit fuck sucks suck crap dammit gross disgusting disgusted
freak freaking stop trouble unfair jealous huge big true super fabulous fantastic excellent
charming gorgeous lovely adorable surprise surprised shocked confused ridiculous insane desperate
pressure stress war weak warm thrilled comfortable worth ready well romantic favorite
"""


def _inflect_noun(noun: str) -> list[str]:
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return [noun, noun + "es"]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return [noun, noun[:-1] + "ies"]
    return [noun, noun + "s"]


def _inflect_verb(verb: str) -> list[str]:
    if verb.endswith("e"):
        return [verb, verb + "s", verb + "d", verb[:-1] + "ing"]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return [verb, verb[:-1] + "ies", verb[:-1] + "ied", verb + "ing"]
    third = verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
    short = re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprt]", verb) is not None
    stem = verb + verb[-1] if short else verb
    return [verb, third, stem + "ed", stem + "ing"]


@functools.cache
def lexicon() -> Lexicon:
    """Read the lists of `words.toml`, inflect, and drop what VADER scores."""
    source = importlib.resources.files(__package__).joinpath("words.toml")
    data = tomllib.loads(source.read_text(encoding="utf-8"))
    scored = vader().valence

    def words(key: str) -> list[str]:
        return list(dict.fromkeys(data["neutral"][key].split()))

    def unscored(items: list[str]) -> tuple[str, ...]:
        return tuple(w for w in dict.fromkeys(items) if w not in scored)

    nouns = words("nouns")
    verbs = words("verbs")
    function = unscored(words("function") + words("contractions") + words("spoken"))
    inflected = itertools.chain(
        words("irregular"),
        itertools.chain.from_iterable(_inflect_noun(w) for w in nouns),
        itertools.chain.from_iterable(_inflect_verb(w) for w in verbs),
        words("adjectives"),
        words("names"),
    )
    emotion = tuple(
        tuple(dict.fromkeys(data["emotion"].get(name, "").split())) for name in EMOTIONS
    )
    every = {w for group in emotion for w in group}
    return Lexicon(
        neutral=unscored([w for w in (*function, *inflected) if w not in every]),
        function=function,
        nouns=unscored(nouns),
        verbs=unscored(verbs),
        names=unscored(words("names")),
        valent=tuple(sorted(scored)),
        common=tuple(w for w in dict.fromkeys(_COMMON.split()) if w in scored),
        boosters=tuple(_BOOSTERS.split()),
        negations=tuple(_NEGATIONS.split()),
        emotion=emotion,
        frames={
            key: tuple(f.strip() for f in re.split(r"[|\n]", value) if f.strip())
            for key, value in data["frames"].items()
        },
    )
