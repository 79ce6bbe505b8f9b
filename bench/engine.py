"""The runtime and bare llama.cpp on the same weights, cut where the benches want to look.

One `Backbone` serves an `Analyzer` of each layout, so that a 7B model is in memory once. What one
of them keeps in the KV cache between answers is therefore restored before a timed call (`prime`).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bundles import TEXT, Pair, features

from mse_kernels import attention, mapped
from mse_runtime.analyzer import Analyzer
from mse_runtime.backbone import Backbone, library
from mse_runtime.bundle import load_bundle
from mse_runtime.prompt import build
from mse_runtime.readout import Readout
from mse_runtime.result import Stopwatch
from mse_runtime.sizing import default_threads, positions

Ids = np.ndarray[Any, np.dtype[np.int32]]


@contextmanager
def llama_cpp_alone() -> Iterator[None]:
    """llama.cpp's own products of weights and attention, where ours stand in for them."""
    folder = library.folder()
    mapped.use(None, folder)
    attention.use(None, folder)
    try:
        yield
    finally:
        mapped.use(library.kernel(), folder)
        attention.use(library.attention(), folder)


class Engine:
    """Both layouts of one backbone, warm. Close it."""

    def __init__(self, pair: Pair, threads: int | None = None, n_gpu_layers: int = 0) -> None:
        bundles = [load_bundle(path) for path in (pair.published, pair.pseudo_last)]
        self.backbone = Backbone.open(
            bundles[0].gguf_path(),
            n_ctx=max(positions(bundle) for bundle in bundles),
            threads=threads or default_threads(bundles[0]),
            n_gpu_layers=n_gpu_layers,
        )
        self.published, self.pseudo_last = (
            Layout(bundle, self.backbone, threads, n_gpu_layers) for bundle in bundles
        )

    @property
    def threads(self) -> int:
        return int(self.backbone.info["threads"])

    def close(self) -> None:
        self.backbone.close()


class Layout:
    """An analyzer of one layout on a shared backbone."""

    def __init__(
        self, bundle: Any, backbone: Backbone, threads: int | None, n_gpu_layers: int
    ) -> None:
        class Shared(Analyzer):
            def _load_backbone(self) -> Backbone:
                return backbone

        self.backbone = backbone
        self.analyzer = Shared(bundle, threads=threads, n_gpu_layers=n_gpu_layers)
        self.features = features(bundle)
        task = bundle.tasks[bundle.default_task]
        self.readout = Readout.build(task, backbone)
        self.prompt = build(backbone, task.prompt, bundle.text, TEXT, bundle.adapter.n_pseudo)

    @property
    def n_prompt(self) -> int:
        """Positions of the prompt."""
        return len(self.prompt)

    @property
    def n_readout(self) -> int:
        """Further positions that scoring the labels takes: the nodes of their trie."""
        return len(self.readout.trie.tokens)

    @property
    def n_logits(self) -> int:
        """Rows of logits that an answer takes: after the prompt and at each branch of the trie."""
        return 1 + int(self.readout.trie.branches.sum())

    @property
    def n_tail(self) -> int:
        """Positions that wait for the features."""
        prompt = self.prompt
        waits = self.n_prompt - len(prompt.early)
        return waits if len(prompt.early) > len(prompt.late) else self.n_prompt

    def prime(self) -> None:
        """Leave the cache as this layout's own last answer would."""
        self.analyzer.forget()
        if len(self.prompt.early) > len(self.prompt.late):
            self.analyzer.analyze_features(self.features, TEXT)

    def answer(self, parity: bool = False) -> float:
        """Seconds from features and text to the answer."""
        self.prime()
        begun = time.perf_counter()
        self.analyzer.analyze_features(self.features, TEXT, parity="published" if parity else None)
        return time.perf_counter() - begun

    def after_features(self) -> float:
        """Seconds from the moment the features are ready; text and model were there before.

        Features come from a thread and the answer is waited for, as in `Analyzer.analyze`: OpenMP
        has a team for each thread that decodes, and with two of them its barriers are slower.
        """
        self.prime()
        pending: Future[Any] = Future()
        ready: list[float] = []

        def supply() -> None:
            try:
                self._until_idle()
                ready.append(time.perf_counter())
                pending.set_result(self.features)
            except BaseException as error:
                pending.set_exception(error)

        thread = threading.Thread(target=supply)
        thread.start()
        self.analyzer._answer(pending, TEXT, None, None, None, Stopwatch())
        took = time.perf_counter() - ready[0]
        thread.join()
        return took

    def _until_idle(self) -> None:
        """Wait until what can be prefilled early has been."""
        early = self.prompt.early
        wanted = len(early) if len(early) > len(self.prompt.late) else 0
        deadline = time.perf_counter() + 120
        while self.backbone.length(0) < wanted and time.perf_counter() < deadline:
            time.sleep(0.002)
        time.sleep(0.01)

    def split(self) -> float:
        """The same answer by tokens, embeddings, tokens: three passes, as multimodal tools do."""
        backbone, prompt = self.backbone, self.prompt
        self.analyzer.forget()
        begun = time.perf_counter()
        pseudo = self.analyzer._pseudo(backbone, prompt, self.features)
        if len(prompt.early):
            backbone.prefill(prompt.early, logits="none")
        backbone.prefill(pseudo, logits="none")
        trie = self.readout.trie
        logits = backbone.prefill_tree(
            prompt.late, trie.tokens, trie.parents, trie.branches, candidates=trie.candidates
        )
        self.readout.score(logits)
        return time.perf_counter() - begun

    def stages(self) -> dict[str, float]:
        """Seconds by stage of one answer, as its result reports them."""
        self.prime()
        found = self.analyzer.analyze_features(self.features, TEXT).timing_ms
        return {name: ms / 1e3 for name, ms in found.items()}


@contextmanager
def llama_cpp_layout(backbone: Backbone) -> Iterator[Backbone]:
    """The same model with its weights laid out as llama.cpp alone would have them.

    `backbone` itself but where ours takes the file's layout.
    """
    if backbone.info["product"] == "llama.cpp":
        yield backbone
        return
    threads = backbone.info["threads"]
    with Backbone.open(backbone.path, n_ctx=256, threads=threads, extra_bufts=True) as other:
        yield other


class Raw:
    """llama.cpp alone: its own layout, products and attention, nothing around the C API."""

    def __init__(self, backbone: Backbone, n_ctx: int | None = None) -> None:
        self.lib = lib = library.load()
        self._open = ExitStack()
        n_ctx = n_ctx or backbone.n_ctx
        backbone = self._open.enter_context(llama_cpp_layout(backbone))
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = min(params.n_ctx, 512)
        params.n_threads = params.n_threads_batch = backbone.info["threads"]
        params.no_perf = True
        offload = bool(backbone.info.get("offloaded_layers"))
        params.offload_kqv = params.op_offload = offload
        self.n_vocab = backbone.n_vocab
        self.context = lib.llama_init_from_model(backbone._model, params)
        if not self.context:
            raise SystemExit("llama.cpp made no second context: not enough memory")
        self.memory = lib.llama_get_memory(self.context)

    def decode(self, n: int, n_logits: int = 1) -> float:
        """Seconds of one `llama_decode` of `n` tokens, logits for the last `n_logits` of them."""
        ids = (np.arange(n) * 37 % self.n_vocab).astype(np.int32)
        flags = (np.arange(n) >= n - n_logits).astype(np.int8)
        with llama_cpp_alone():
            return self._timed(ids, flags)

    def _timed(self, ids: Ids, flags: Any) -> float:
        lib, n = self.lib, len(ids)
        begun = time.perf_counter()
        lib.llama_memory_clear(self.memory, False)
        batch = lib.llama_batch_get_one(ids.ctypes.data_as(ctypes.POINTER(lib.llama_token)), n)
        batch.logits = flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        if lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        lib.llama_get_logits_ith(self.context, -1)[0]
        return time.perf_counter() - begun

    def first_logit(self) -> float:
        """Of the last decode."""
        return float(self.lib.llama_get_logits_ith(self.context, -1)[0])

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self._open.close()


def request(pair: Pair, layout: Layout) -> dict[str, Any]:
    """What a peer needs to answer the same prompt: ids before and after the pseudo tokens."""
    return {
        "shape": pair.shape,
        "gguf": str(pair.gguf),
        "bundle": str(Path(pair.published)),
        "early": layout.prompt.early.tolist(),
        "late": layout.prompt.late.tolist(),
        "text": layout.prompt.text_ids.tolist(),
        "new_tokens": layout.analyzer.bundle.tasks["sentiment"].max_new_tokens,
    }
