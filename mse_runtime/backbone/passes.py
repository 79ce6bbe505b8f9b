"""Passes through the model: what `Backbone` asks for, as few `llama_decode`s as it takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from mse_runtime.backbone import checks
from mse_runtime.backbone.batch import Entries, fillers, make_batch
from mse_runtime.backbone.head import Head
from mse_runtime.backbone.loading import Handles, Options
from mse_runtime.backbone.reports import log_errors, log_mark
from mse_runtime.backbone.sequences import Sequences
from mse_runtime.errors import BackboneError, DecodeError, StoppedError
from mse_runtime.gguf import Gguf

__all__ = ["Passes"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


class NoRoom(DecodeError):
    """The cache is full; nothing of the pass is in it."""


class Passes(Sequences):
    """Runs batches of entries; `Backbone` makes them. Callers hold the lock."""

    def __init__(self, gguf: Gguf, handles: Handles, options: Options) -> None:
        super().__init__(gguf, handles, options)
        self._head = Head(gguf)

    @contextmanager
    def aside(self) -> Iterator[Callable[[], None]]:
        """For passes beside other work: they leave it a core, and can be stopped.

        Gives a function that any thread may call, while this lasts or later: a pass that runs then
        raises StoppedError, the sequence being left as it was, and so do those that follow. Without
        the kernels' library neither is so. Other threads wait with their passes meanwhile.
        """
        with self._lock:
            self._check_open()
            stop = _stop()
            if stop is None:
                yield _nothing
                return
            kind, usual = self._lib.ggml_abort_callback, int(self.info["threads"])
            fewer = max(1, usual - 1)
            try:
                self._lib.llama_set_n_threads(self._context, fewer, fewer)
                callback = ctypes.cast(stop.callback, kind)
                self._lib.llama_set_abort_callback(self._context, callback, stop.user_data)
                yield stop.set
            finally:
                self._lib.llama_set_abort_callback(self._context, kind(), None)
                self._lib.llama_set_n_threads(self._context, usual, usual)

    def _decode(self, entries: Entries, before: dict[int, int], only: Ids | None = None) -> Floats:
        """Run the entries in as few passes as fit: the wanted logits [k, n_vocab] in order.

        [k, m] for the m token ids of `only`. If a pass fails, the sequences in `before` are cut
        back to the lengths given there.
        """
        found: list[Floats] = []
        try:
            for start, stop in checks.passes(
                entries.wanted, self.n_batch, self._options.n_outputs_max
            ):
                found.append(self._pass(entries.part(start, stop), only))
                if not np.isfinite(found[-1]).all():
                    raise BackboneError(
                        f"{self.path} gives logits that are not numbers. The file may be damaged, "
                        "or an embedding row far out of the model's range; try extra_bufts=False "
                        "too."
                    )
        except BaseException:
            for seq, length in before.items():
                self._lib.llama_memory_seq_rm(self._memory, seq, length, -1)
            raise
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _pass(self, entries: Entries, only: Ids | None) -> Floats:
        """One `llama_decode`: the wanted logits."""
        n = int(entries.wanted.sum())
        if only is not None and n and self._taps(entries):
            self._tap.arm()
            try:
                self._run(entries)
            finally:
                hidden = self._tap.disarm()
            if len(hidden) == n:
                return self._head.logits(hidden, only)
            if len(hidden):  # the pass ended there, so there are no logits
                raise BackboneError(
                    f"{self.path}: {len(hidden)} hidden states came back for {n} wanted ones. "
                    "This build of llama.cpp cuts passes in another way: report it, please."
                )
        else:
            self._run(entries)
        if not n:
            return np.empty((0, self.n_vocab if only is None else len(only)), np.float32)
        raw = self._lib.llama_get_logits(self._context)
        found = np.ctypeslib.as_array(
            ctypes.cast(raw, ctypes.POINTER(ctypes.c_float)), (n, self.n_vocab)
        )
        return found.copy() if only is None else found[:, only]

    def _taps(self, entries: Entries) -> bool:
        """Whether the last hidden states can be had: of a pass that llama.cpp does not cut up."""
        return self._tap is not None and self._head.plain and len(entries) <= self._n_ubatch

    def _run(self, entries: Entries) -> None:
        """`llama_decode`, filled up where that is cheaper and there is room."""
        more = fillers(len(entries)) if self.info["repacked"] else 0
        whole = min(self.n_batch, self._n_ubatch)  # what llama.cpp neither refuses nor cuts up
        if not more or len(entries) + more > whole:
            self._run_these(entries)
            return
        spare = self._options.n_sequences - 1
        try:
            self._run_these(entries.filled(more, spare))
        except NoRoom:
            self._run_these(entries)
        finally:
            self._lib.llama_memory_seq_rm(self._memory, spare, -1, -1)

    def _run_these(self, entries: Entries) -> None:
        mark = log_mark()
        batch, keep = make_batch(self._lib, entries)
        code = self._lib.llama_decode(self._context, batch)
        del keep
        if self._rounding is not None:
            self._rounding.finish(decoded=code == 0)
        if code == 0:
            return
        if code == 2:
            raise StoppedError("The pass was stopped. Nothing of it is in the cache.")
        if code == 1:
            raise NoRoom(
                f"The KV cache has no room for {len(entries)} more positions (n_ctx {self.n_ctx}, "
                "shared by all sequences). Clear or truncate some, or open with a larger n_ctx."
            )
        raise DecodeError(
            f"llama.cpp refused a batch of {len(entries)} (code {code}): "
            f"{log_errors(mark) or 'no reason given'}. Clear the sequence and try again; "
            "if it stays, run mse-doctor."
        )


def _stop() -> Any:
    """A `mse_kernels.tap.Stop`; None where there are no kernels, or older ones."""
    try:
        from mse_kernels.tap import Stop

        return Stop()
    except (ImportError, RuntimeError, AttributeError):
        return None


def _nothing() -> None:
    pass
