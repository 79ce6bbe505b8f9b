"""`Backbone`: token ids or embedding rows in, logits out, and a KV cache that can be handled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt

from mse_runtime.backbone import checks, tree
from mse_runtime.backbone.batch import Entries, Inputs
from mse_runtime.backbone.loading import Handles, Options, load_model
from mse_runtime.backbone.passes import Passes
from mse_runtime.backbone.rotary import RopeTable
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["Backbone"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

PROVEN = ("llama", "qwen", "qwen2", "chatglm")
"""Architectures whose rows and tokens the tests have compared."""


class Backbone(Passes):
    """A frozen GGUF language model with a KV cache of `n_seq_max` sequences.

    Open with `Backbone.open`; a context manager. Calls from several threads are serialised by
    one lock. Whatever would abort llama.cpp's process (too large a batch, a foreign token, a full
    cache, rows that are not numbers) raises BackboneError instead, and leaves the cache as it was.
    """

    path: Path
    arch: str
    n_embd: int
    n_vocab: int
    n_layer: int
    bos_id: int
    """-1 where the vocabulary has none."""
    eos_id: int

    def __init__(self, gguf: Gguf, handles: Handles, options: Options) -> None:
        super().__init__(gguf, handles, options)
        self.bos_id, self.eos_id = handles.vocabulary.bos, handles.vocabulary.eos

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        n_ctx: int = 512,
        n_seq_max: int = 1,
        threads: int | None = None,
        n_gpu_layers: int = 0,
        kv_type: Literal["f16", "f32"] = "f16",
        low_memory: bool = False,
        extra_bufts: bool | None = None,
        flash_attention: bool | None = None,
        n_outputs_max: int = 32,
        tree_width: int = 16,
        rope_table: RopeTable = "exact",
        texts: Sequence[str] = (),
        progress: Callable[[float], None] | None = None,
    ) -> Self:
        """Load a model.

        n_ctx: positions of the KV cache, rounded up to a multiple of 256.
        n_seq_max: sequences 0 .. n_seq_max - 1.
        threads: default one for each physical core.
        n_gpu_layers: layers to put on the GPU; 0 none, -1 all.
        kv_type: `f32` doubles the cache and makes runs comparable to 1e-4.
        low_memory: keep the weights as they are in the mapped file: slower where they would be
            repacked.
        extra_bufts: allow repacking and AMX; None asks the first-run probe (see `probe`).
        flash_attention: None lets llama.cpp decide; with `f32` None means no, since flash
        attention rounds the cache to float16.
        n_outputs_max: rows of logits one pass may give (memory: 4 n_vocab bytes each).
        tree_width: leaves of a trie that one pass of `prefill_tree` takes.
        rope_table: `bf16` rounds cosines and sines of the positions, as some published runs had
        them (see `rotary`); every rotation then goes through Python.
        texts: all that will be tokenised soon. Of a large vocabulary only what they need is loaded
            then (`excerpt`), and the rest when other text comes.
        progress: called with 0.0 .. 1.0 while the weights load; may raise to stop it.

        Raises BackboneError for files and options that cannot be used.
        """
        options = Options(
            n_ctx, n_seq_max, threads, n_gpu_layers, kv_type, low_memory, extra_bufts,
            flash_attention, n_outputs_max, tree_width, rope_table,
        ).checked()  # fmt: skip
        gguf = Gguf.open(path)
        try:
            backbone = cls(gguf, load_model(gguf, options, progress, texts), options)
        except BaseException:
            gguf.close()
            raise
        try:
            if gguf.arch not in PROVEN:
                backbone._check_rows()
        except BaseException:
            backbone.close()
            raise
        return backbone

    def _check_rows(self) -> None:
        """For architectures without a test here: some scale tokens but not rows."""
        ids = np.arange(2) % self.n_vocab
        by_ids = self.prefill(ids)
        self.clear(0)
        by_rows = self.prefill(self.embed(ids))
        self.clear(0)
        if np.abs(by_ids - by_rows).max() > 0.01 * np.abs(by_ids).max():
            raise BackboneError(
                f"{self.path} ({self.arch}) cannot be used here: llama.cpp treats embedding rows "
                "of this architecture differently from its tokens. Use llama, qwen, qwen2, chatglm."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Text

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> Ids:
        """Token ids of `text`: int32 [n].

        Nothing is added but a BOS id if `bos`. Spellings of special tokens (`</s>`,
        `<|im_start|>`) in the text are ordinary characters unless `special`. SentencePiece
        vocabularies put their dummy space in front of each text that is tokenised alone.
        """
        with self._lock:
            self._check_open()
            ids = self._vocabulary.tokenize(text, special)
            if bos:
                if self.bos_id < 0:
                    raise BackboneError(
                        f"{self.path} has no BOS token, so none can be put in front. Open the "
                        "prompt with one of its own special tokens instead (special=True)."
                    )
                ids = np.concatenate([np.array([self.bos_id], np.int32), ids])
            return ids

    def detokenize(self, ids: npt.ArrayLike, *, special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless `special`."""
        with self._lock:
            self._check_open()
            return self._vocabulary.detokenize(checks.token_ids(ids, self.n_vocab), special)

    def embed(self, ids: npt.ArrayLike) -> Floats:
        """Input embeddings of token ids: float32 [n, n_embd], as the model itself looks them up."""
        with self._lock:
            self._check_open()
            return self._gguf.rows(ids)

    # Evaluation

    @overload
    def prefill(
        self, inputs: npt.ArrayLike, *, seq: int = 0, logits: Literal["last", "all"] = "last"
    ) -> Floats: ...

    @overload
    def prefill(self, inputs: npt.ArrayLike, *, seq: int = 0, logits: Literal["none"]) -> None: ...

    def prefill(
        self,
        inputs: npt.ArrayLike,
        *,
        seq: int = 0,
        logits: Literal["last", "none", "all"] = "last",
    ) -> Floats | None:
        """Append token ids [n] or embedding rows [n, n_embd] to a sequence.

        Returns the logits after the last one, float32 [n_vocab]; None for `logits="none"`;
        float32 [n, n_vocab] for `"all"` (in several passes, meant for tests). Ids and rows give
        the same logits. Raises BackboneError, the sequence being left as it was.
        """
        with self._lock:
            self._check_open()
            self._check_seq(seq)
            entered = checks.inputs(inputs, self.n_vocab, self.n_embd)
            if logits not in ("last", "none", "all"):
                raise BackboneError(f"logits must be 'last', 'none' or 'all', not {logits!r}.")
            n = len(entered)
            wanted = np.full(n, logits == "all")
            wanted[-1] = logits != "none"
            start = self.length(seq)
            self._check_room(n, start, seq)
            positions = np.arange(start, start + n, dtype=np.int32)
            found = self._decode(Entries(entered, positions, [(seq,)] * n, wanted), {seq: start})
            if logits == "none":
                return None
            return found if logits == "all" else found[0]

    def prefill_many(self, parts: Iterable[tuple[int, npt.ArrayLike]]) -> Floats:
        """Append to several sequences at once: float32 [k, n_vocab], the last logits of each.

        One pass over the weights for all of them. Where some parts are rows and others ids, the
        ids are embedded first: llama.cpp takes no mixed batch.
        """
        with self._lock:
            self._check_open()
            entered = self._entered(parts)
            before: dict[int, int] = {}
            positions, sequences, wanted = [], [], []
            for seq, part in entered:
                n, start = len(part), self.length(seq)
                self._check_room(n, start, seq)
                before[seq] = start
                positions.append(np.arange(start, start + n, dtype=np.int32))
                sequences += [(seq,)] * n
                wanted.append(np.arange(n) == n - 1)
            joined: Inputs = np.concatenate([part for _, part in entered])
            entries = Entries(joined, np.concatenate(positions), sequences, np.concatenate(wanted))
            return self._decode(entries, before)

    def prefill_tree(
        self,
        inputs: npt.ArrayLike,
        tokens: npt.ArrayLike,
        parents: npt.ArrayLike,
        wanted: npt.ArrayLike | None = None,
        *,
        candidates: npt.ArrayLike | None = None,
        seq: int = 0,
    ) -> Floats:
        """Append ids or rows as `prefill` does and score a trie of continuations, in one pass.

        tokens: token ids [n]. parents: for each the index of the node before it, parents before
        children; -1 for those that follow the last input. wanted: bool [n], the nodes whose logits
        are asked for; default all. Returns float32 [1 + k, n_vocab]: the logits after the last
        input, then after each wanted node. The sequence ends with the inputs; the nodes leave no
        trace. Shared beginnings are computed once. More than `tree_width` leaves take more passes.
        candidates: token ids [m]; the logits of these alone, float32 [1 + k, m], cost a fraction of
        all (`head`). Raises BackboneError, the sequence being left as it was.
        """
        found: Floats = self.prefill_trees(
            [(seq, inputs)], tokens, parents, wanted, candidates=candidates
        )[0]
        return found

    def prefill_trees(
        self,
        parts: Iterable[tuple[int, npt.ArrayLike]],
        tokens: npt.ArrayLike,
        parents: npt.ArrayLike,
        wanted: npt.ArrayLike | None = None,
        *,
        candidates: npt.ArrayLike | None = None,
    ) -> Floats:
        """`prefill_tree` for several sequences in one pass, the same trie after each.

        parts: (sequence, ids or rows), as in `prefill_many`. Returns float32 [s, 1 + k, n_vocab] or
        [s, 1 + k, m] for s parts. A pass takes `tree_width` leaves, those of all parts together.
        """
        with self._lock:
            self._check_open()
            entered = self._entered(parts)
            trie = tree.Trie.checked(tokens, parents, wanted, self.n_vocab)
            only = None if candidates is None else checks.token_ids(candidates, self.n_vocab)
            width = self._options.tree_width
            if len(trie) and width < len(entered):
                raise BackboneError(
                    f"{len(entered)} trees do not fit: this backbone was opened with tree_width="
                    f"{width}. Open it with more, or `reserve` it."
                )
            before = {seq: self.length(seq) for seq, _ in entered}
            for seq, part in entered:
                self._check_room(len(part) + trie.height, before[seq], seq)
            columns = self.n_vocab if only is None else len(only)
            found = np.empty((len(entered), 1 + trie.n_wanted, columns), np.float32)
            row = np.cumsum(trie.wanted)  # where in `found` a wanted node's logits go
            starts = before
            try:
                for wave in trie.waves(width // len(entered)):
                    rows = row[wave.nodes][trie.wanted[wave.nodes]]
                    logits = self._look_ahead(entered, trie, wave, starts, only)
                    if len(entered[0][1]):
                        rows = np.append(0, rows)
                    found[:, rows] = logits.reshape(len(entered), len(rows), columns)
                    starts = {seq: starts[seq] + len(part) for seq, part in entered}
                    entered = [(seq, part[:0]) for seq, part in entered]  # for the other waves
            except BaseException:  # a later wave: the inputs are in the cache by then
                for seq, length in before.items():
                    self._lib.llama_memory_seq_rm(self._memory, seq, length, -1)
                raise
            return found

    def _look_ahead(
        self, entered: Sequence[tuple[int, Inputs]], trie: tree.Trie, wave: tree.Wave,
        starts: dict[int, int], only: Ids | None,
    ) -> Floats:  # fmt: skip
        """Decode inputs (perhaps none) and nodes: the logits of the last input and those wanted."""
        ids, depths = trie.tokens[wave.nodes], trie.depths[wave.nodes]
        inputs: list[Inputs] = []
        positions, sequences, wanted = [], [], []
        scratch: list[tuple[int, range]] = []
        free = self.n_seq_max
        for seq, part in entered:
            n, leaves = len(part), range(free, free + wave.n_leaves)
            free = leaves.stop
            scratch.append((seq, leaves))
            inputs += [part, ids if part.ndim == 1 else self.embed(ids)]
            positions.append(np.concatenate([np.arange(n), n + depths]) + starts[seq])
            sequences += [(seq, *leaves)] * n
            sequences += [tuple(leaves[leaf] for leaf in below) for below in wave.leaves]
            wanted += [np.arange(n) == n - 1, trie.wanted[wave.nodes]]
        joined: Any = np.concatenate(inputs)
        entries = Entries(
            joined,
            np.concatenate(positions).astype(np.int32),
            sequences,
            np.concatenate(wanted),
        )
        try:
            for seq, leaves in scratch:  # cells are shared, nothing is copied
                for leaf in leaves:
                    self._lib.llama_memory_seq_cp(self._memory, seq, leaf, -1, -1)
            return self._decode(entries, starts, only)
        finally:
            for leaf in range(self.n_seq_max, free):
                self._lib.llama_memory_seq_rm(self._memory, leaf, -1, -1)

    def _entered(self, parts: Iterable[tuple[int, npt.ArrayLike]]) -> list[tuple[int, Inputs]]:
        """Checked inputs by sequence, all ids or all rows: llama.cpp takes no mixed batch."""
        entered = [(seq, checks.inputs(part, self.n_vocab, self.n_embd)) for seq, part in parts]
        if not entered:
            raise BackboneError("Give at least one part: no sequence was named.")
        for seq, _ in entered:
            self._check_seq(seq)
        if len({seq for seq, _ in entered}) < len(entered):
            raise BackboneError("A sequence occurs twice. Join its parts.")
        if len({part.ndim for _, part in entered}) == 1:
            return entered
        return [(seq, self.embed(part) if part.ndim == 1 else part) for seq, part in entered]
