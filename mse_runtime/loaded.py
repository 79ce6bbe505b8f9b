"""What an open bundle holds, loading beside the caller: memory plan, backbone and adapter.

`Analyzer` adds the answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mse_runtime import background
from mse_runtime.bundle import Bundle
from mse_runtime.errors import BackboneError, DeviceError
from mse_runtime.memory import measured
from mse_runtime.placement import Plan, check_gpu, open_planned
from mse_runtime.readout import Readout, label_texts
from mse_runtime.result import Stopwatch
from mse_runtime.sizing import default_threads, make_plan, positions

if TYPE_CHECKING:
    from mse_runtime.adapter import Adapter
    from mse_runtime.backbone import Backbone
    from mse_runtime.features.pool import FeaturePool
    from mse_runtime.features.spec import Features

__all__ = ["Loaded"]

SMALL_PASS = 16
"""Positions of a pass after `shrink`: a fraction of a prompt's, and still above one token."""


class Loaded:
    """Owns what was loaded for a bundle. A context manager."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        n_gpu_layers: int | None = None,
        low_memory: bool = False,
        adapter: str = "auto",
        require_gpu: bool = False,
        texts: Sequence[str] = (),
        pool: FeaturePool | None = None,
    ) -> None:
        """Start loading `bundle` in the background; see `Analyzer.open` for the arguments."""
        self.bundle = bundle
        self.threads = threads
        self.low_memory = low_memory
        self._require_gpu = require_gpu
        texts = (texts,) if isinstance(texts, str) else texts
        self._texts = [*_constant_texts(bundle), *texts] if texts else []
        self._pool = pool
        self._turn = threading.Lock()
        self._reading = threading.Event()  # from here on loading is not Python's work
        self._readouts: dict[str, Readout] = {}
        self._constant: NDArray[np.int32] = np.empty(0, np.int32)
        self._load_seconds = self._load_started = 0.0
        self.last_features: Features | None = None
        program = measured().rss  # before the features' part is used, beside the planning
        self._plan: Future[Plan] = background.start(
            lambda: make_plan(
                bundle,
                n_gpu_layers=n_gpu_layers,
                low_memory=low_memory,
                require_gpu=require_gpu,
                program=program,
                feature_process=pool is not None,
            ),
            "mse-plan",
        )
        self._backbone: Future[Backbone] = background.start(self._load_backbone, "mse-load")
        self._backbone.add_done_callback(lambda _: self._reading.set())  # it may fail before
        self._adapter: Future[Adapter] = background.start(
            lambda: self._load_adapter(adapter), "mse-adapter"
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

    def close(self) -> None:
        """Free backbone and adapter; what is still loading is freed when it has loaded."""

        def free(loaded: Future[Any]) -> None:
            if loaded.exception() is None and hasattr(loaded.result(), "close"):
                loaded.result().close()

        with self._turn:
            self._backbone.add_done_callback(free)
            self._adapter.add_done_callback(free)

    def ready(self) -> None:
        """Wait until backbone and adapter are loaded; raises what kept them from it."""
        self._backbone.result()
        self._adapter.result()

    def forget(self) -> None:
        """Empty the KV cache, the kept part of the prompt included: a fresh start."""
        with self._turn:
            self._constant = np.empty(0, np.int32)
            self._backbone.result().clear()

    def shrink(self) -> None:
        """After the language model failed: a new, empty KV cache and smaller passes from now on.

        Raises DeviceError where not even that fits: nothing can be answered any more.
        """
        with self._turn:
            self._constant = np.empty(0, np.int32)
            try:
                self._backbone.result().shrink(SMALL_PASS)
            except BackboneError as error:
                raise DeviceError(
                    f"There is no memory left for the language model ({error}). Close other "
                    "programs or try --low-memory, and start again."
                ) from error

    @property
    def backbone_info(self) -> dict[str, Any]:
        """`Backbone.info`; waits until the backbone is loaded."""
        return self._backbone.result().info

    @property
    def plan(self) -> Plan:
        """The memory plan; it is made before the weights load."""
        return self._plan.result()

    def _loaded(self, watch: Stopwatch) -> Backbone:
        backbone = self._backbone.result()
        if self._load_seconds:  # only the first answer pays for it
            watch.add("load", self._load_seconds)
            if self._load_started + self._load_seconds > watch.started:  # it was still loading
                watch.started = min(watch.started, self._load_started)
            self._load_seconds = 0.0
        return backbone

    def _load_backbone(self) -> Backbone:
        self._load_started = time.perf_counter()
        plan = self.plan
        plan.check_ram()
        backbone = open_planned(
            self.bundle.gguf_path(),
            plan,
            n_ctx=positions(self.bundle),
            threads=self.threads or default_threads(self.bundle),
            low_memory=self.low_memory,
            texts=self._texts,
            progress=lambda _: self._reading.set(),
        )
        if self._require_gpu:
            try:
                check_gpu(plan, backbone.info)
            except DeviceError:
                backbone.close()
                raise
        self._load_seconds = time.perf_counter() - self._load_started
        return backbone

    def _load_adapter(self, backend: str) -> Adapter:
        from mse_runtime.adapter import open_adapter

        return open_adapter(self.bundle, backend=backend, threads=self.threads or 1)


def _constant_texts(bundle: Bundle) -> Iterator[str]:
    """What the bundle's own prompts and labels say."""
    for task in bundle.tasks.values():
        yield from (segment.text for segment in task.prompt if segment.text)
        yield from label_texts(task)
