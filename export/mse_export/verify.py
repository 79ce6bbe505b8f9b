"""Checks of a written bundle against the reference, run by default at the end of an export.

The torch adapter against ONNX Runtime and the bundle as `mse_runtime` loads it; the prompt's
layout; the tokeniser and the first-step logits against the Hugging Face folder where it is at hand.
The results go into the manifest's `parity` and the model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mse_export.watcher import Watcher
from mse_runtime.bundle import Bundle, load_bundle
from mse_runtime.errors import BundleError

__all__ = ["Check", "Report", "verify"]

ADAPTER_BOUND = {"fp32": 1e-5, "fp16": 5e-3}
LOGIT_BOUND = {"F32": 5e-3, "F16": 0.1, "BF16": 0.1}
"""Largest |logit difference| at the first step. Quantised types have no bound: their difference is
reported, and arg max where the reference decides clearly."""
CLEAR_GAP = 1.0
TOKENISER_STRINGS = 300
SENTENCE = "I really love this movie and the acting is great"


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    result: Literal["ok", "failed", "skipped"]
    measured: str = ""
    bound: str = ""

    def to_dict(self) -> dict[str, str]:
        values = {
            "name": self.name,
            "result": self.result,
            "measured": self.measured,
            "bound": self.bound,
        }
        return {key: value for key, value in values.items() if value}


@dataclass
class Report:
    """All checks of a bundle."""

    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, good: bool, measured: str, bound: str = "") -> None:
        self.checks.append(Check(name, "ok" if good else "failed", measured, bound))

    def to_dict(self) -> dict[str, Any]:
        """The manifest's `parity`."""
        return {"checks": [check.to_dict() for check in self.checks]}

    def raise_if_failed(self) -> None:
        """BundleError naming the failed checks."""
        failed = [
            f"{c.name} ({c.measured}, bound {c.bound})" for c in self.checks if c.result == "failed"
        ]
        if failed:
            raise BundleError(
                f"The bundle does not agree with the reference: {'; '.join(failed)}. It was not "
                "written. If you know why, --no-verify writes it all the same."
            )


def verify(
    bundle: Bundle,
    *,
    folder: Path | None = None,
    threads: int | None = None,
    watcher: Watcher | None = None,
) -> Report:
    """Check the bundle at `bundle.path`. folder: the Hugging Face folder it was made from."""
    from mse_runtime.backbone import Backbone

    watcher = watcher or Watcher()
    report = Report()
    loaded = load_bundle(bundle.path, offline=True)
    _check_adapter(loaded, report)
    with Backbone.open(
        loaded.gguf_path(),
        n_ctx=512,
        threads=threads,
        low_memory=True,
        kv_type="f32" if loaded.backbone.gguf.type == "F32" else "f16",
    ) as backbone:
        _check_prompt(loaded, backbone, report)
        if folder is None:
            for name in ("tokeniser", "first-step logits"):
                report.checks.append(Check(name, "skipped", "no Hugging Face folder at hand"))
            return report
        watcher.note("Comparing with the Hugging Face folder")
        _check_tokeniser(loaded, backbone, folder, report)
        _check_logits(loaded, backbone, folder, report)
    return report


def adapter_inputs(bundle: Bundle, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs in the bundle's shapes; lengths 0, 1 and the maximum among them."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for name, steps, dim in (
        ("audio", bundle.features.audio.max_steps, bundle.adapter.audio_dim),
        ("video", bundle.features.face.max_steps, bundle.adapter.face_dim),
        ("text", bundle.text.max_tokens, bundle.adapter.n_embd),
    ):
        inputs[name] = rng.standard_normal((4, steps, dim), dtype=np.float32)
        first = 0 if name != "text" else 1
        inputs[f"{name}_len"] = np.array([steps, first, 1, max(1, steps // 2)], np.int64)
    return inputs


def _check_adapter(bundle: Bundle, report: Report) -> None:
    import torch

    from mse_export.adapter import adapter_from_state
    from mse_export.checkpoint import read_checkpoint
    from mse_runtime.adapter import open_adapter

    reference = adapter_from_state(read_checkpoint(bundle.weights_path()).state)
    inputs = adapter_inputs(bundle)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.inference_mode():
        expected = reference(**tensors).numpy()
    half = bundle.adapter.onnx.size < 0.75 * bundle.adapter.weights.size
    for backend in ("onnx", "numpy"):
        adapter = open_adapter(bundle, backend)
        try:
            found = adapter(**inputs)
        finally:
            adapter.close()
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        bound = ADAPTER_BOUND["fp16" if half and backend == "onnx" else "fp32"]
        report.add(
            f"adapter: torch against {backend}", error <= bound, f"{error:.1e}", f"{bound:.0e}"
        )


def _check_prompt(bundle: Bundle, backbone: Any, report: Report) -> None:
    """The pieces stand where the layout says, and the positions fit the context."""
    from mse_runtime import prompt

    for name, task in bundle.tasks.items():
        built = prompt.build(backbone, task.prompt, bundle.text, SENTENCE, bundle.adapter.n_pseudo)
        slots = [piece.slot for piece in built.pieces if piece.slot != "fixed"]
        wanted = ["pseudo", "text"] if bundle.layout == "published" else ["text", "pseudo"]
        padded = bundle.text.pad != "left" or len(built.text_ids) == bundle.text.max_tokens
        starts = [int(i) for piece in built.pieces if piece.slot == "fixed" for i in piece.ids]
        bos = starts.count(backbone.bos_id) if backbone.bos_id >= 0 else 0
        wanted_bos = sum(segment.bos for segment in task.prompt)
        own = backbone.arch in ("llama",)
        good = slots == wanted and padded and (bos == wanted_bos or not own)
        report.add(
            f"prompt layout: {name}",
            good,
            f"{len(built)} positions, {bos} BOS, slots {' '.join(slots)}",
            f"{wanted_bos} BOS, slots {' '.join(wanted)}" if own else f"slots {' '.join(wanted)}",
        )


def _check_tokeniser(bundle: Bundle, backbone: Any, folder: Path, report: Report) -> None:
    import unicodedata

    from mse_export.reference_tokenizer import reference_tokenizer, sample_strings

    encode = reference_tokenizer(folder, bundle.backbone.arch)
    strings = sample_strings(TOKENISER_STRINGS)
    for task in bundle.tasks.values():
        strings += [segment.text for segment in task.prompt if segment.text and not segment.special]
        strings += [label.text for label in task.labels]
    strings = [unicodedata.normalize("NFC", text) for text in strings]
    wrong = [text for text in strings if backbone.tokenize(text).tolist() != encode(text)]
    report.add(
        "tokeniser", not wrong, f"{len(strings) - len(wrong)} of {len(strings)} equal", "all"
    )
    if wrong:
        report.warnings.append(f"The tokeniser differs, for example on {wrong[0]!r}.")


def _check_logits(bundle: Bundle, backbone: Any, folder: Path, report: Report) -> None:
    from mse_export.hf_folder import HfFolder
    from mse_export.reference_lm import ReferenceLM

    reference = ReferenceLM(HfFolder(folder), round_bf16=bundle.layout == "published")
    rows = prompt_rows(bundle, backbone, reference)
    backbone.clear()
    found, expected = backbone.prefill(rows), reference.logits(rows)[-1]
    error = float(np.abs(found - expected).max())
    top = np.sort(expected)
    same = int(found.argmax()) == int(expected.argmax())
    kind = bundle.backbone.gguf.type or ""
    bound = LOGIT_BOUND.get(kind)
    clear = float(top[-1] - top[-2]) > CLEAR_GAP
    good = (error <= bound if bound is not None else True) and (same or not clear)
    measured = (
        f"largest difference {error:.2g}, arg max {'equal' if same else 'differs'}, "
        "both with the exact rotary table"
    )
    report.add(
        "first-step logits", good, measured, f"{bound:g}" if bound else "arg max where clear"
    )


def prompt_rows(bundle: Bundle, backbone: Any, reference: Any) -> NDArray[np.float32]:
    """The default task's prompt as rows, with pseudo tokens from made-up features."""
    from mse_runtime import prompt
    from mse_runtime.adapter import open_adapter

    built = prompt.build(
        backbone, bundle.task.prompt, bundle.text, SENTENCE, bundle.adapter.n_pseudo
    )
    text = reference.embed(built.text_ids)
    inputs: Mapping[str, Any] = adapter_inputs(bundle)
    adapter = open_adapter(bundle, "onnx")
    try:
        pseudo = adapter(
            inputs["audio"][:1],
            inputs["audio_len"][:1],
            inputs["video"][:1],
            inputs["video_len"][:1],
            text[None],
            np.array([len(text)], np.int64),
        )
    finally:
        adapter.close()
    return built.rows(reference.embed, pseudo[0])
