"""The published way of answering: greedy generation, every token kept, and its parser.

Published-model spec, sections 4 and 5. It exists to compare with published numbers; the readout
over the label trie is what people should use.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mse_runtime.records import dataclass

__all__ = ["Generated", "generate", "parse"]

# Spec section 5: characters the published parser maps before float(), regression only.
REGRESSION_CLEANUP = str.maketrans({"–": "-", "一": "-", "：": "", "/": "", "(": "", ":": ""})


class Decoder(Protocol):
    """What generation needs of a backbone."""

    @property
    def eos_id(self) -> int: ...

    def prefill(self, rows: NDArray[np.int32], *, seq: int = 0) -> NDArray[np.float32] | None: ...

    def detokenize(self, ids: NDArray[np.int32]) -> str: ...


@dataclass(frozen=True)
class Generated:
    """Greedy ids [n] without the end token, their text, and the number the parser reads in it."""

    ids: tuple[int, ...]
    text: str
    value: float


def generate(
    backbone: Decoder,
    first: NDArray[np.float32],
    kind: Literal["regression", "classification"],
    max_new_tokens: int,
    *,
    scale: float = 1.0,
    seq: int = 0,
) -> Generated:
    """Continue greedily from `first` [n_vocab], the logits after the prompt.

    `scale`: what the task writes numbers times.
    """
    ids: list[int] = []
    logits: NDArray[np.float32] | None = first
    while logits is not None:
        token = int(logits.argmax())
        if token == backbone.eos_id:
            break
        ids.append(token)
        if len(ids) == max_new_tokens:
            break
        logits = backbone.prefill(np.array([token], np.int32), seq=seq)
    text = backbone.detokenize(np.array(ids, np.int32))
    return Generated(tuple(ids), text, parse(text, kind) / scale)


def parse(text: str, kind: Literal["regression", "classification"]) -> float:
    """The number the published code reads: Python's `float`, else 0.0 (spec section 5)."""
    if kind == "regression":
        text = text.translate(REGRESSION_CLEANUP)
    try:
        return float(text)
    except ValueError:
        return 0.0
