"""The bundle's README: what it is, what it was made from, what was checked, what it must not do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mse_runtime.bundle import Bundle, FileRef, Task

__all__ = ["model_card"]


def model_card(bundle: Bundle, source: str, licence: str) -> str:
    """Markdown for `README.md`. source, licence: of the language model."""
    adapter, backbone = bundle.adapter, bundle.backbone
    gguf = backbone.gguf
    kind = f" ({gguf.type})" if gguf.type else ""
    where = gguf.file if isinstance(gguf, FileRef) else f"{gguf.repo}, {gguf.file}"
    lines = [
        f"# {bundle.name}",
        "",
        "A bundle for mse-runtime: an MSE-Adapter (arXiv 2502.12478) with the frozen language "
        "model that it steers.",
        "",
        "```console",
        'mse-run CLIP.mp4 "what the person says" --bundle .',
        "```",
        "",
    ]
    if not bundle.trained:
        lines += [
            "**The adapter is untrained.** Its answers mean nothing; the bundle is for measuring "
            "speed and memory.",
            "",
        ]
    lines += [
        "## Parts",
        "",
        "| part | |",
        "|---|---|",
        f"| language model | {where}{kind}, {gguf.size / 1e9:.2f} GB, architecture "
        f"{backbone.arch}, {backbone.n_layer} layers, width {backbone.n_embd} |",
        f"| made from | {source or 'unknown'} |",
        f"| adapter | {adapter.parameters:,} parameters, {adapter.n_pseudo} pseudo tokens |",
        f"| audio features | {bundle.features.audio.spec}, {adapter.audio_dim} columns |",
        f"| face features | {bundle.features.face.spec}, {adapter.face_dim} columns |",
        f"| prompt layout | {bundle.layout} |",
        f"| training | {bundle.training.status}. {bundle.training.note} |",
        "",
        "## Tasks",
        "",
        *(_task_line(name, task) for name, task in bundle.tasks.items()),
        "",
        "## Checked at export",
        "",
        *(_parity(bundle.parity) or ["Not verified (--no-verify)."]),
        "",
        *_validation(bundle.parity),
        "## Limits",
        "",
        "- The answer is the model's guess about an expression, not a fact about a person's "
        "feelings. Don't use it to judge people, and not without their consent.",
        "- Metrics of the training data set, if any, do not carry over to other speakers, "
        "languages or recording conditions.",
        "",
        "## Licence",
        "",
        f"The language model: {licence or 'the licence of its source, which applies unchanged'}. "
        "The adapter: the licence under which it was trained and given to you.",
        "",
    ]
    return "\n".join(lines)


def _task_line(name: str, task: Task) -> str:
    if task.kind == "regression" and task.range is not None:
        low, high = task.range
        grid = f"from {low:g} to {high:g} in steps of {task.step:g}"
        return f"- `{name}` ({task.language}): a number {grid}"
    labels = ", ".join(label.name for label in task.labels)
    return f"- `{name}` ({task.language}): one of {labels}"


def _validation(parity: Mapping[str, Any]) -> list[str]:
    """Metrics of the best epoch, as mse-train left them in the checkpoint."""
    metrics = parity.get("validation")
    if not isinstance(metrics, Mapping) or not metrics:
        return []
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    return ["## Validation split at training", "", "| metric | |", "|---|---|", *rows, ""]


def _parity(parity: Mapping[str, Any]) -> list[str]:
    checks = parity.get("checks")
    if not isinstance(checks, list) or not checks:
        return []
    lines = ["| check | result | measured | bound |", "|---|---|---|---|"]
    for check in checks:
        measured, bound = check.get("measured", ""), check.get("bound", "")
        lines.append(f"| {check['name']} | {check['result']} | {measured} | {bound} |")
    return lines
