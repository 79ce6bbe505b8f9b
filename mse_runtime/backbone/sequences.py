"""The KV cache of an open model: its sequences, and keeping them across a larger context."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mse_runtime.backbone import state
from mse_runtime.backbone.loading import Context, Handles, Options, free_model, make_context
from mse_runtime.backbone.rotary import RopeTable
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["Sequences"]


class Sequences:
    """Owns the C objects. `Backbone` adds text and evaluation."""

    n_ctx: int
    """Positions all sequences share; a position that several sequences share counts once."""
    n_batch: int
    """Positions one pass takes; longer inputs are cut into several."""
    n_seq_max: int
    info: dict[str, Any]
    """llama.cpp's version and build, device, threads, buffers in MiB, warnings."""

    def __init__(self, gguf: Gguf, handles: Handles, options: Options) -> None:
        self._gguf, self._lib = gguf, handles.lib
        self._model, self._vocabulary = handles.model, handles.vocabulary
        self._lock = threading.RLock()
        self.path, self.arch = gguf.path, gguf.arch
        self.n_embd, self.n_vocab, self.n_layer = gguf.n_embd, gguf.n_vocab, gguf.n_layer
        self.info = handles.info
        self._adopt(handles.context, options)

    def _adopt(self, context: Context, options: Options) -> None:
        self._context, self._options = context.pointer, options
        self.n_seq_max = options.n_seq_max
        self._rounding, self._tap = context.rounding, context.tap
        self._memory = self._lib.llama_get_memory(self._context)
        self.n_batch = int(self._lib.llama_n_batch(self._context))
        self._n_ubatch = int(self._lib.llama_n_ubatch(self._context))
        self.n_ctx = int(self._lib.llama_n_ctx(self._context))
        self.info |= {
            "kv_type": options.kv_type,
            "rope_table": options.rope_table,
            "n_ctx": self.n_ctx,
        }

    def close(self) -> None:
        """Free the model, the cache and the mapping. Closing twice is harmless."""
        with self._lock:
            context, model = self._context, self._model
            self._context = self._model = self._memory = None
            if context is not None:
                self._lib.llama_free(context)
            self._vocabulary.close()
            if model is not None:
                free_model(self._lib, model)
            self._gguf.close()

    def _check_open(self) -> None:
        if self._context is None:
            raise BackboneError(f"The backbone {self.path} has been closed. Open it again.")

    def reserve(
        self, n_ctx: int, tree_width: int = 0, *, n_seq_max: int = 1, n_outputs: int = 1
    ) -> bool:
        """See to it that so many positions, leaves, sequences and rows of logits fit in one pass.

        Where they do not yet, a larger cache is made beside the old one and the sequences move
        there, a matter of milliseconds; returns whether that was needed. Sequences and leaves are
        255 at most together, the leaves being cut to what is left. Raises BackboneError where
        there is no memory for it, the old cache being kept.
        """
        with self._lock:
            self._check_open()
            n_seq_max = max(n_seq_max, self.n_seq_max)
            options = replace(
                self._options,
                n_ctx=max(n_ctx, self.n_ctx),
                n_seq_max=n_seq_max,
                tree_width=min(max(tree_width, self._options.tree_width), 255 - n_seq_max),
                n_outputs_max=max(n_outputs, self._options.n_outputs_max),
            ).checked()
            if options == self._options:
                return False
            lengths = {seq: self.length(seq) for seq in range(self.n_seq_max)}
            kept = {seq: self.save_state(seq) for seq, length in lengths.items() if length}
            context = make_context(self._lib, self._model, options)
            self._lib.llama_free(self._context)
            self._adopt(context, options)
            for seq, saved in kept.items():
                self.load_state(seq, saved)
            return True

    def renew(self, *, kv_type: Literal["f16", "f32"], rope_table: RopeTable) -> bool:
        """Start over with an empty cache of this kind, a matter of milliseconds.

        Nothing happens where it is of this kind already; returns whether it was not. The arguments
        are those of `Backbone.open`. Raises BackboneError, the old cache being kept.
        """
        with self._lock:
            self._check_open()
            options = replace(self._options, kv_type=kv_type, rope_table=rope_table).checked()
            if options == self._options:
                return False
            context = make_context(self._lib, self._model, options)
            self._lib.llama_free(self._context)
            self._adopt(context, options)
            return True

    def shrink(self, positions: int) -> None:
        """Start over with an empty cache and at most `positions` in one pass, for good.

        The buffers of a pass grow with its positions: where memory ran out, this may still fit,
        only slower. Logits change in their last digits. What is there is freed first.
        """
        with self._lock:
            self._check_open()
            options = replace(self._options, max_batch=min(positions, self._options.max_batch))
            self._lib.llama_free(self._context)
            self._context = self._memory = None
            self._adopt(make_context(self._lib, self._model, options), options)

    def _check_seq(self, seq: int) -> None:
        if isinstance(seq, bool) or not isinstance(seq, int | np.integer):
            raise BackboneError(f"A sequence id is a whole number, not {seq!r}.")
        if not 0 <= seq < self.n_seq_max:
            raise BackboneError(
                f"There is no sequence {seq}: this backbone has 0 .. {self.n_seq_max - 1}. Open it "
                "with a larger n_seq_max."
            )

    def _check_room(self, n: int, start: int, seq: int) -> None:
        if start + n > self.n_ctx:
            raise BackboneError(
                f"{n} more positions do not fit: sequence {seq} has {start} of n_ctx {self.n_ctx}. "
                "Shorten the input, truncate the sequence, or open with a larger n_ctx."
            )

    def length(self, seq: int = 0) -> int:
        """Positions in a sequence."""
        with self._lock:
            self._check_open()
            self._check_seq(seq)
            return int(self._lib.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def clear(self, seq: int | None = None) -> None:
        """Empty one sequence, or all."""
        with self._lock:
            self._check_open()
            if seq is None:
                self._lib.llama_memory_clear(self._memory, False)
                return
            self._check_seq(seq)
            self._lib.llama_memory_seq_rm(self._memory, seq, -1, -1)

    def copy(self, src: int, dst: int) -> None:
        """Make `dst` a copy of `src`. The cells are shared: it takes no time and no room."""
        with self._lock:
            self._check_open()
            self._check_seq(src)
            self._check_seq(dst)
            if src != dst:
                self._lib.llama_memory_seq_rm(self._memory, dst, -1, -1)
                self._lib.llama_memory_seq_cp(self._memory, src, dst, -1, -1)

    def truncate(self, seq: int, n: int) -> None:
        """Keep the first `n` positions of a sequence (0 .. its length)."""
        with self._lock:
            length = self.length(seq)
            if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 0 <= n <= length:
                raise BackboneError(
                    f"Sequence {seq} has {length} positions; it cannot be cut to {n!r}."
                )
            if n < length:
                self._lib.llama_memory_seq_rm(self._memory, seq, n, -1)

    def save_state(self, seq: int = 0) -> bytes:
        """The sequence's keys and values, for `load_state` on the same model and options."""
        with self._lock:
            return state.save(self._lib, self._context, self._fingerprint(), seq, self.length(seq))

    def load_state(self, seq: int, saved: bytes | memoryview) -> None:
        """Replace a sequence by a saved one.

        Raises BackboneError for states that are damaged or come from another model, cache type,
        attention setting or rotary table; the sequence is then unchanged. If there is no room it is
        left empty.
        """
        with self._lock:
            self._check_open()
            self._check_seq(seq)
            state.load(self._lib, self._context, self._fingerprint(), seq, saved, self.n_ctx)

    def _fingerprint(self) -> Sequence[object]:
        return (
            self.arch, self._gguf.size, self.n_embd, self.n_layer, self.n_vocab,
            self._options.kv_type, self._options.flash_attention, self._options.rope_table,
        )  # fmt: skip
