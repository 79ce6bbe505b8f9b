"""From a clip and its transcript to an answer: the one room that knows all the others.

The backbone loads in the background from the moment an `Analyzer` is opened, and features are
extracted beside it. Where most of the prompt stands before the pseudo tokens (the pseudo-last
layout), that part is prefilled while the clip is still being decoded, and the constant part of it
is kept in the KV cache between utterances (and in a file between processes: `kept_prefix`); after
the last feature only the pseudo tokens and the tail remain. Otherwise (published layouts, features
that are there already) the prompt is one all-embedding batch. The labels are scored in the same
pass as the prompt's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mse_runtime import ahead, background, heap, kept_prefix
from mse_runtime.bundle import Bundle, Task, load_bundle
from mse_runtime.bundle.hub import resolve_bundle
from mse_runtime.errors import UsageError
from mse_runtime.features.normalise import prepare
from mse_runtime.features.spec import Features
from mse_runtime.loaded import Loaded
from mse_runtime.memory import measured
from mse_runtime.parity import Generated, generate
from mse_runtime.placement import MB
from mse_runtime.prompt import Prompt, build, check_text
from mse_runtime.readout import Answer, Readout
from mse_runtime.result import Prediction, Stopwatch
from mse_runtime.sizing import vram_mb

if TYPE_CHECKING:
    from mse_runtime.backbone import Backbone
    from mse_runtime.features.pool import FeaturePool

__all__ = ["Analyzer"]

Parity = Literal["published"]
Rows = NDArray[np.float32]
PASS, SEQUENCES = 512, 250
"""Positions that llama.cpp takes in one piece, and sequences that it knows."""
FILLERS = 16
"""Rows that may fill a pass up (`backbone.batch.fillers`)."""
# Stages of `extract`, as the result names them.
STAGES = {"probe": "decode", "decode": "decode", "audio": "features", "face": "features"}


class Analyzer(Loaded):
    """A loaded bundle that answers for clips. Safe to share between threads: calls take turns.

    Use as a context manager, or call `close`. Errors are `mse_runtime.errors.MSEError`s.
    """

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
        texts: Sequence[str] = (),
        pool: FeaturePool | None = None,
    ) -> Analyzer:
        """Open a bundle by built-in name, folder or `org/repo[@revision]`.

        `threads`: None means the physical cores, or one for a small model. `n_gpu_layers`: None
        lets the memory plan choose. `low_memory` keeps the weights as the mapped file (slower
        where they would be repacked). `adapter` names a backend of `mse_runtime.adapter`.
        `require_gpu` refuses to run without one. `offline` never uses the network. `texts`: the
        transcripts, if they are few and known: of a large vocabulary only what they and the
        bundle's prompts need is loaded, and the rest when another comes. `pool`: whose
        processes read the clips; None reads them in threads of this one. The caller closes it.
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
            texts=texts,
            pool=pool,
        )

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
        feature rate of the bundle's spec; `keep_frames` small pictures are kept for a plot (never
        in a `pool`). The extracted features stay in `last_features` until the next call.
        """
        check_text(text)
        watch = Stopwatch()
        inputs = self.bundle.features
        wanted: dict[str, Any] = {
            "path": str(clip),
            "audio_spec": inputs.audio.spec,
            "face_spec": inputs.face.spec,
            "fps": fps,
            "start": start,
            "end": end,
            "max_seconds": max_seconds,
            "threads": self.threads,
        }

        def in_threads() -> Features:
            # The way to the weights is Python, and so is the way to the clip: in turns both would
            # take longer, and most clips are done before the weights are. Not for long: on a first
            # run the way leads through the probe's process.
            self._reading.wait(1.0)
            from mse_runtime.features.extract import extract

            return extract(**wanted, keep_frames=keep_frames, bundle=self.bundle)

        if self._pool is None or keep_frames:
            features = background.start(in_threads, "mse-features")
        else:
            encoders = str(self.bundle.path) if self.bundle.encoders else None
            features = self._pool.submit({**wanted, "bundle": encoders})
        first = self.last_features is None
        prediction = self._answer(features, text, task, parity, str(clip), watch, fresh=True)
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
        watch = Stopwatch()
        return self._answer(ready, check_text(text), task, parity, clip, watch)

    def analyze_many(
        self, clips: Iterable[tuple[Features, str, str | None]], *, task: str | None = None
    ) -> list[Prediction]:
        """Answers for several clips, in as few passes through the language model as they fit in.

        clips: (features, transcript, name of the clip or None) each. Raises what `analyze_features`
        raises, for all of them. Timings are those of a pass, shared evenly. Probabilities differ
        from those of one clip at a time by rounding (docs/reliability.md). `last_features` stays
        as it was; other threads wait until all clips are answered.
        """
        name, wanted = self.task(task)
        todo = [(features, check_text(text), clip) for features, text, clip in clips]
        found: list[Prediction] = []
        with self._turn:
            while todo:
                count = self._fitting(name, wanted, [text for _, text, _ in todo])
                found += self._answer_together(name, wanted, todo[:count])
                todo = todo[count:]
        return found

    def new_positions(self, text: str, task: str | None = None) -> int:
        """Positions that an answer for this transcript takes beyond what all prompts share.

        Waits until the backbone is loaded. Raises UsageError for a text or a task that cannot be.
        """
        name, wanted = self.task(task)
        backbone = self._backbone.result()
        prompt = self._prompt(backbone, wanted, text, None)
        trie = self._readout(name, wanted, backbone).trie
        return len(prompt) - len(_constant(prompt)) + len(trie.tokens)

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
        *,
        fresh: bool = False,
    ) -> Prediction:
        """fresh: what the features took belongs to this answer."""
        name, task = self.task(task_name)
        with self._turn:
            waiting: list[Future[Any]] = [features, self._backbone]
            wait(waiting, return_when=FIRST_COMPLETED)
            if features.done():
                features.result()  # a clip that cannot be read need not wait for the model
            backbone = self._loaded(watch)
            self._as_published(backbone, parity == "published")
            readout = self._readout(name, task, backbone)
            prompt = self._prompt(backbone, task, text, parity)
            trie = readout.trie
            room = len(prompt) + max(len(trie.tokens) + 1, task.max_new_tokens)
            backbone.reserve(room, trie.n_paths + 1)
            try:
                with watch.stage("prefill"):
                    known = self._prefill_constant(backbone, prompt)
                    pending = self._prefill_early(backbone, prompt, known, features)
                found = features.result()
                for stage, seconds in _spent(found) if fresh else ():
                    watch.add(stage, seconds)
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
                        generated = generate(
                            backbone, logits[0], task.kind, task.max_new_tokens,
                            scale=task.number_scale or 1.0,
                        )  # fmt: skip
            finally:
                backbone.truncate(0, len(self._constant))
            self.last_features = found
        timing = watch.stages | {"total": watch.total()}
        peak = found.process_peak if fresh else 0
        return self._prediction(name, answer, prompt, found, text, clip, timing, generated, peak)

    def _answer_together(
        self, name: str, task: Task, clips: Sequence[tuple[Features, str, str | None]]
    ) -> list[Prediction]:
        """Answers from one pass: each clip's prompt and labels in a sequence of its own.

        What all prompts begin with is there once, in sequence 0.
        """
        watch = Stopwatch()
        backbone = self._loaded(watch)
        self._as_published(backbone, False)
        readout = self._readout(name, task, backbone)
        trie = readout.trie
        prompts = [self._prompt(backbone, task, text, None) for _, text, _ in clips]
        shared = min(prompts, key=lambda prompt: len(_constant(prompt)))
        known = len(_constant(shared))
        new = sum(len(prompt) - known + len(trie.tokens) for prompt in prompts)
        backbone.reserve(
            known + new + FILLERS,
            len(clips) * (trie.n_paths + 1),
            n_seq_max=1 + len(clips),
            n_outputs=len(clips) * (1 + int(trie.branches.sum())),
        )
        sequences = range(1, 1 + len(clips))
        try:
            with watch.stage("prefill"):
                self._prefill_constant(backbone, shared)
                for seq in sequences:
                    backbone.copy(0, seq)
            rows = []
            for prompt, (features, _, _) in zip(prompts, clips, strict=True):
                with watch.stage("adapter"):
                    pseudo = self._pseudo(backbone, prompt, features)
                rows.append(prompt.rows(backbone.embed, pseudo)[known:])
            with watch.stage("prefill"):
                logits = backbone.prefill_trees(
                    zip(sequences, rows, strict=True), trie.tokens, trie.parents, trie.branches,
                    candidates=trie.candidates,
                )  # fmt: skip
            with watch.stage("readout"):
                answers = [readout.score(found) for found in logits]
        finally:
            for seq in sequences:
                backbone.clear(seq)
        timing = watch.stages | {"total": watch.total()}
        each = {stage: ms / len(clips) for stage, ms in timing.items()}
        return [
            self._prediction(name, answer, prompt, features, text, clip, each, None)
            for answer, prompt, (features, text, clip) in zip(answers, prompts, clips, strict=True)
        ]

    def _fitting(self, name: str, task: Task, texts: Sequence[str]) -> int:
        """How many of the clips with these texts go into one pass; at least one."""
        trie = self._readout(name, task, self._backbone.result()).trie
        used = 0
        for count, text in enumerate(texts):
            used += self.new_positions(text, name)
            if count and (used > PASS or (count + 1) * (trie.n_paths + 2) > SEQUENCES):
                return count
        return len(texts)

    def _prediction(
        self,
        task: str,
        answer: Answer,
        prompt: Prompt,
        features: Features,
        text: str,
        clip: str | None,
        timing: dict[str, float],
        generated: Generated | None,
        beside: int = 0,
    ) -> Prediction:
        """beside: peak in bytes of the process that read the clip."""
        backbone, adapter = self._backbone.result(), self._adapter.result()
        return Prediction(
            task=task,
            answer=answer,
            text=text,
            clip=clip,
            warnings=self._warnings(prompt, features, backbone),
            timing_ms=timing,
            memory_mb={
                "peak_rss": (measured().peak_rss + beside) / MB,
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

    def _prompt(self, backbone: Backbone, task: Task, text: str, parity: Parity | None) -> Prompt:
        # A stranger's transcript must not write control tokens; the published code let it.
        special = self.bundle.text.special and parity == "published"
        rule = replace(self.bundle.text, special=special)
        return build(backbone, task.prompt, rule, text, self.bundle.adapter.n_pseudo)

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

    def _prefill_early(
        self, backbone: Backbone, prompt: Prompt, known: int, features: Future[Features]
    ) -> NDArray[np.int32]:
        """Prefill what stands before the pseudo tokens, if that pays; the ids still to be fed.

        known: positions that are there already.

        It pays where more of the prompt stands before the pseudo tokens than after, and the
        features are still being extracted (`ahead`): otherwise one pass is cheaper than two. The
        constant part is a pass of its own whether or not it is cached, so that an answer does not
        depend on what was asked before.
        """
        pending = prompt.early[known:]
        if len(prompt.early) <= len(prompt.late) or not len(pending):
            return pending
        if features.done() or not ahead.prefill(backbone, self.bundle, pending, features):
            return pending
        return pending[:0]

    def _prefill_constant(self, backbone: Backbone, prompt: Prompt) -> int:
        """See to it that sequence 0 holds the constant part of the prompt, where that pays.

        Returns how many positions that is.
        """
        constant = _constant(prompt)
        if not np.array_equal(constant, self._constant) or not len(constant):
            backbone.clear(0)
            self._constant = np.empty(0, np.int32)
            if len(constant) and not kept_prefix.restore(backbone, self.bundle, constant):
                backbone.prefill(backbone.embed(constant), logits="none")
                kept_prefix.store(backbone, self.bundle, constant)
            self._constant = constant
        return len(constant)

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

    def _readout(self, name: str, task: Task, backbone: Backbone) -> Readout:
        if name not in self._readouts:
            self._readouts[name] = Readout.build(task, backbone)
        return self._readouts[name]


def _spent(features: Features) -> Iterator[tuple[str, float]]:
    """(stage, seconds) of the extraction; a process that a clip took over may say anything."""
    spent = features.info.get("seconds")
    for name, stage in STAGES.items():
        seconds = spent.get(name) if isinstance(spent, dict) else None
        if isinstance(seconds, int | float) and 0 <= seconds < 1e9:
            yield stage, seconds


def _constant(prompt: Prompt) -> NDArray[np.int32]:
    """The ids that it pays to keep: none where more of the prompt is late than early."""
    early = prompt.early
    return early[: prompt.n_constant if len(early) > len(prompt.late) else 0]
