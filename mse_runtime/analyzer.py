"""From a clip and its transcript to an answer: the one room that knows all the others.

The backbone loads in the background from the moment an `Analyzer` is opened, and features are
extracted beside it. Where most of the prompt stands before the pseudo tokens (the pseudo-last
layout), that part is prefilled while the clip is still being decoded, and the constant part of it
is kept in the KV cache between utterances (and in a file between processes: `kept_prefix`); after
the last feature only the pseudo tokens and the tail remain. Otherwise (published layouts) the
prompt is one all-embedding batch. The labels are scored in the same pass as the prompt's end.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mse_runtime import background, heap, kept_prefix
from mse_runtime.bundle import Bundle, Task, load_bundle
from mse_runtime.bundle.hub import resolve_bundle
from mse_runtime.errors import BackboneError, DeviceError, UsageError
from mse_runtime.features.normalise import prepare
from mse_runtime.parity import generate
from mse_runtime.placement import MB, Plan, check_gpu, measured, open_planned
from mse_runtime.prompt import Prompt, build, check_text
from mse_runtime.readout import Readout
from mse_runtime.result import Prediction, Stopwatch
from mse_runtime.sizing import default_threads, make_plan, positions, vram_mb

if TYPE_CHECKING:
    from mse_runtime.adapter import Adapter
    from mse_runtime.backbone import Backbone
    from mse_runtime.features.spec import Features

__all__ = ["Analyzer"]

Parity = Literal["published"]
Rows = NDArray[np.float32]
SMALL_PASS = 16
"""Positions of a pass after `shrink`: a fraction of a prompt's, and still above one token."""
# Stages of `extract`, as the result names them.
STAGES = {"probe": "decode", "decode": "decode", "audio": "features", "face": "features"}


class Analyzer:
    """A loaded bundle that answers for clips. Safe to share between threads: calls take turns.

    Use as a context manager, or call `close`. Errors are `mse_runtime.errors.MSEError`s.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        n_gpu_layers: int | None = None,
        low_memory: bool = False,
        adapter: str = "auto",
        require_gpu: bool = False,
    ) -> None:
        """Start loading `bundle` in the background; see `open` for the arguments."""
        self.bundle = bundle
        self.threads = threads
        self._low_memory = low_memory
        self._require_gpu = require_gpu
        self._n_gpu_layers = n_gpu_layers
        self._turn = threading.Lock()
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
            ),
            "mse-plan",
        )
        self._backbone: Future[Backbone] = background.start(self._load_backbone, "mse-load")
        self._adapter: Future[Adapter] = background.start(
            lambda: self._load_adapter(adapter), "mse-adapter"
        )

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle = "tiny",
        *,
        threads: int | None = None,
        n_gpu_layers: int | None = None,
        low_memory: bool = False,
        adapter: str = "auto",
        require_gpu: bool = False,
        offline: bool = False,
    ) -> Analyzer:
        """Open a bundle by built-in name, folder or `org/repo[@revision]`.

        `threads`: None means the physical cores, or one for a small model. `n_gpu_layers`: None
        lets the memory plan choose. `low_memory` keeps the weights as the mapped file (slower, no
        repacked copy). `adapter` names a backend of `mse_runtime.adapter`. `require_gpu` refuses
        to run without one. `offline` never uses the network.
        """
        if not isinstance(bundle, Bundle):
            folder = resolve_bundle(str(bundle), offline=offline)
            bundle = load_bundle(folder, offline=offline)
        return cls(
            bundle,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            low_memory=low_memory,
            adapter=adapter,
            require_gpu=require_gpu,
        )

    def __enter__(self) -> Analyzer:
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

    def analyze(
        self,
        clip: str | Path,
        text: str,
        *,
        task: str | None = None,
        parity: Parity | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        max_seconds: float = 60.0,
        keep_frames: int = 0,
    ) -> Prediction:
        """Answer for a media file and its transcript.

        `start`, `end` and `max_seconds` are seconds on the clip's clock; `fps` overrides the face
        feature rate of the bundle's spec; `keep_frames` small pictures are kept for a plot. The
        extracted features stay in `last_features` until the next call.
        """
        from mse_runtime.features.extract import extract

        check_text(text)
        watch = Stopwatch()
        inputs = self.bundle.features
        features = background.start(
            lambda: extract(
                clip,
                audio_spec=inputs.audio.spec,
                face_spec=inputs.face.spec,
                fps=fps,
                start=start,
                end=end,
                max_seconds=max_seconds,
                threads=self.threads,
                trace=lambda stage, seconds: watch.add(STAGES[stage], seconds),
                keep_frames=keep_frames,
                bundle=self.bundle,
            ),
            "mse-features",
        )
        first = self.last_features is None
        prediction = self._answer(features, text, task, parity, str(clip), watch)
        if not first:  # a process that answers once is about to give everything back
            heap.give_back()
        return prediction

    def analyze_features(
        self,
        features: Features,
        text: str,
        *,
        task: str | None = None,
        parity: Parity | None = None,
        clip: str | None = None,
    ) -> Prediction:
        """Answer for features that were extracted before (`features.extract.load_npz`)."""
        ready: Future[Features] = Future()
        ready.set_result(features)
        return self._answer(ready, check_text(text), task, parity, clip, Stopwatch())

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
    def plan(self) -> Plan:
        """The memory plan; it is made before the weights load."""
        return self._plan.result()

    def task(self, name: str | None) -> tuple[str, Task]:
        """The task called `name`, or the bundle's default."""
        name = name or self.bundle.default_task
        if name not in self.bundle.tasks:
            raise UsageError(
                f"The bundle {self.bundle.name!r} has no task {name!r}. Its tasks are: "
                f"{', '.join(self.bundle.tasks)}."
            )
        return name, self.bundle.tasks[name]

    # -- one utterance ---------------------------------------------------------------------------

    def _answer(
        self,
        features: Future[Features],
        text: str,
        task_name: str | None,
        parity: Parity | None,
        clip: str | None,
        watch: Stopwatch,
    ) -> Prediction:
        name, task = self.task(task_name)
        with self._turn:
            waiting: list[Future[Any]] = [features, self._backbone]
            wait(waiting, return_when=FIRST_COMPLETED)
            if features.done():
                features.result()  # a clip that cannot be read need not wait for the model
            backbone = self._loaded(watch)
            self._as_published(backbone, parity == "published")
            readout = self._readout(name, task, backbone)
            # A stranger's transcript must not write control tokens; the published code let it.
            special = self.bundle.text.special and parity == "published"
            rule = replace(self.bundle.text, special=special)
            prompt = build(backbone, task.prompt, rule, text, self.bundle.adapter.n_pseudo)
            trie = readout.trie
            room = len(prompt) + max(len(trie.tokens) + 1, task.max_new_tokens)
            backbone.reserve(room, trie.n_paths + 1)
            try:
                with watch.stage("prefill"):
                    pending = self._prefill_early(backbone, prompt)
                found = features.result()
                with watch.stage("adapter"):
                    pseudo = self._pseudo(backbone, prompt, found)
                with watch.stage("prefill"):
                    rows = [backbone.embed(pending), pseudo, backbone.embed(prompt.late)]
                    # Generating takes every logit, scoring the labels a few.
                    only = None if parity else trie.candidates
                    logits = backbone.prefill_tree(
                        np.concatenate(rows), trie.tokens, trie.parents, trie.branches,
                        candidates=only,
                    )  # fmt: skip
                with watch.stage("readout"):
                    answer = readout.score(logits[:, trie.candidates] if parity else logits)
                    generated = None
                    if parity:
                        generated = generate(backbone, logits[0], task.kind, task.max_new_tokens)
            finally:
                backbone.truncate(0, len(self._constant))
            self.last_features = found
        adapter = self._adapter.result()
        return Prediction(
            task=name,
            answer=answer,
            text=text,
            clip=clip,
            warnings=self._warnings(prompt, found, backbone),
            timing_ms=watch.stages | {"total": watch.total()},
            memory_mb={
                "peak_rss": measured().peak_rss / MB,
                "vram": vram_mb(backbone.info["buffers_mib"]),
                "plan": self.plan.ram / MB,
            },
            backend={
                "adapter": adapter.name,
                "adapter_choice": adapter.choice,
                "backbone": backbone.info | {"n_layer": backbone.n_layer},
            },
            bundle={
                "name": self.bundle.name,
                "version": self.bundle.version,
                "trained": self.bundle.trained,
            },
            generated=generated,
        )

    def _as_published(self, backbone: Backbone, published: bool) -> None:
        """Give the backbone the cache and the rotary table of the published runs, or its own.

        What was in the cache is gone where that changes anything.
        """
        about = self.bundle.backbone
        changed = backbone.renew(
            kv_type="f32" if published and about.gguf.type == "F32" else "f16",
            rope_table=(published and about.rope_table) or "exact",
        )
        if changed:
            self._constant = np.empty(0, np.int32)

    def _prefill_early(self, backbone: Backbone, prompt: Prompt) -> NDArray[np.int32]:
        """Prefill what stands before the pseudo tokens, if that pays; the ids still to be fed.

        It pays where more of the prompt stands before the pseudo tokens than after. The batches are
        cut at the same places whether or not the constant part is cached, so that an answer does
        not depend on what was asked before.
        """
        early = prompt.early
        if len(early) <= len(prompt.late):
            backbone.clear(0)
            self._constant = np.empty(0, np.int32)
            return early
        constant = early[: prompt.n_constant]
        if not np.array_equal(constant, self._constant):
            backbone.clear(0)
            self._constant = np.empty(0, np.int32)
            if len(constant) and not kept_prefix.restore(backbone, self.bundle, constant):
                backbone.prefill(backbone.embed(constant), logits="none")
                kept_prefix.store(backbone, self.bundle, constant)
            self._constant = constant
        if len(rest := early[len(constant) :]):
            backbone.prefill(backbone.embed(rest), logits="none")
        return early[:0]

    def _pseudo(self, backbone: Backbone, prompt: Prompt, features: Features) -> Rows:
        """The pseudo tokens [P, D] for one utterance."""
        audio, n_audio = prepare(features.audio, self.bundle.features.audio)
        face, n_face = prepare(features.face, self.bundle.features.face)
        text = backbone.embed(prompt.text_ids)
        one = np.ones(1, np.int64)
        adapter = self._adapter.result()
        pseudo: Rows = adapter(
            audio[None], n_audio * one, face[None], n_face * one, text[None], len(text) * one
        )[0]
        return pseudo

    def _warnings(self, prompt: Prompt, features: Features, backbone: Backbone) -> tuple[str, ...]:
        found = [*features.warnings, *backbone.info.get("warnings", ())]
        inputs = self.bundle.features
        for name, track, expected in (
            ("voice", features.audio, inputs.audio),
            ("face", features.face, inputs.face),
        ):
            if track is not None and len(track) > expected.max_steps:
                found.append(
                    f"The {name} features have {len(track)} steps; only the bundle's first "
                    f"{expected.max_steps} are used."
                )
        limit = self.bundle.text.max_tokens
        if prompt.n_text_total > limit:
            found.append(
                f"The text is longer than the bundle's {limit} tokens; only its beginning is used."
            )
        if not self.bundle.trained:
            found.append(
                f"The bundle {self.bundle.name!r} is untrained: its answers mean nothing yet."
            )
        return tuple(found)

    # -- loading ---------------------------------------------------------------------------------

    def _loaded(self, watch: Stopwatch) -> Backbone:
        backbone = self._backbone.result()
        if self._load_seconds:  # only the first answer pays for it
            watch.add("load", self._load_seconds)
            if self._load_started + self._load_seconds > watch.started:  # it was still loading
                watch.started = min(watch.started, self._load_started)
            self._load_seconds = 0.0
        return backbone

    def _readout(self, name: str, task: Task, backbone: Backbone) -> Readout:
        if name not in self._readouts:
            self._readouts[name] = Readout.build(task, backbone)
        return self._readouts[name]

    def _load_backbone(self) -> Backbone:
        self._load_started = time.perf_counter()
        plan = self.plan
        plan.check_ram()
        backbone = open_planned(
            self.bundle.gguf_path(),
            plan,
            n_ctx=positions(self.bundle),
            threads=self.threads or default_threads(self.bundle),
            low_memory=self._low_memory,
        )
        if self._require_gpu:
            check_gpu(plan, backbone.info)
        self._load_seconds = time.perf_counter() - self._load_started
        return backbone

    def _load_adapter(self, backend: str) -> Adapter:
        from mse_runtime.adapter import open_adapter

        return open_adapter(self.bundle, backend=backend, threads=self.threads or 1)
