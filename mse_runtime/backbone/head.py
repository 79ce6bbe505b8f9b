"""The logits of a few tokens, without the others'.

Scoring a task's labels compares a dozen tokens where the vocabulary has 150,000, and the output
matrix is a fifth of a small model's work at the end of a prompt. So a pass ends at the last hidden
states (the scheduler's callback, `mse_kernels.tap`), and the few rows of the matrix are multiplied
here: in float32, where llama.cpp would round the hidden states to eight bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["ARCHITECTURES", "Head", "make_tap"]

Floats = npt.NDArray[np.float32]

ARCHITECTURES = frozenset({"llama", "qwen", "qwen2", "chatglm"})
"""Whose graphs end in the node LAST, the output matrix and nothing else."""
LAST = "result_norm"
_ELSE = ("logit_scale", "final_logit_softcapping")


def make_tap(lib: Any, rows: int, width: int) -> Any:
    """A `mse_kernels.tap.Tap` for a context; None where there are no kernels or no such ggml."""
    try:
        from mse_kernels.tap import Tap

        return Tap(lib._lib, LAST, rows, width)  # libllama, which is linked against ggml
    except (ImportError, RuntimeError, AttributeError):
        return None


class Head:
    """The output matrix of a model, rows of it in float32 as they are asked for."""

    def __init__(self, gguf: Gguf) -> None:
        self._gguf = gguf
        self._rows: dict[bytes, Floats] = {}
        self.plain = self._is_plain()
        """Whether the logits are the matrix times the hidden states."""

    def logits(self, hidden: Floats, ids: npt.NDArray[np.int32]) -> Floats:
        """hidden [k, n_embd], token ids [m] -> logits [k, m]."""
        key = ids.tobytes()
        if key not in self._rows:
            self._rows[key] = self._gguf.head_rows(ids)
        return hidden @ self._rows[key].T

    def _is_plain(self) -> bool:
        gguf = self._gguf
        more = [name for name in gguf.tensors if name.startswith("output.")]
        if gguf.arch not in ARCHITECTURES or more not in ([], ["output.weight"]):
            return False
        if any(f"{gguf.arch}.{key}" in gguf.metadata for key in _ELSE):
            return False
        try:
            return gguf.head_rows([0]).shape == (1, gguf.n_embd)
        except BackboneError:  # a type that only llama.cpp decodes
            return False
