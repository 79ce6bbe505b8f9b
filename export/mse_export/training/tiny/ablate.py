"""Ablations: adapters fitted alike but for one thing, compared on the validation clips.

All variants of a seed start from the same encoders (the warm-up knows nothing of what is varied)
and have the same, shortened schedule, so they compare with each other and not with the bundle.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from mse_export.training.tiny.adapter_stage import fit, validate, warmed_up
from mse_export.training.tiny.schedule import AdapterSchedule
from mse_export.training.tiny.workspace import Run

__all__ = ["ablate", "variants"]

_LOG = logging.getLogger(__name__)


def variants(base: AdapterSchedule) -> dict[str, AdapterSchedule]:
    """The adapters that are compared."""
    return {
        "as shipped (pseudo-last, P = 4)": base,
        "no TGM": replace(base, mixer=False),
        "no MSF (one scale)": replace(base, single_scale=True),
        "published layout": replace(base, layout="published"),
        "P = 1": replace(base, pseudo=1),
        "P = 2": replace(base, pseudo=2),
        "P = 8": replace(base, pseudo=8),
    }


def ablate(run: Run, *, seeds: tuple[int, ...] = (1, 2, 3), steps: int = 240) -> dict[str, Any]:
    """Fit every variant for every seed; resumes from `ablations.json` in the working folder.

    The first variant's row is also read with media taken away or exchanged: the same adapters.
    """
    path = run.work / "ablations.json"
    have = run.material()
    model, processor, clips = have["model"], have["processor"], have["validation"]
    full = run.scale.adapter
    base = replace(
        full, steps=min(steps, full.steps), batch=32, warm_up=min(400, full.warm_up), rate=2e-3
    )
    report: dict[str, Any] = {
        "clips": len(clips),
        "identities": len({c.identity for c in clips}),
        "steps": base.steps,
        "batch": base.batch,
        "warm_up": base.warm_up,
        "table": {},
        "inputs": {},
    }
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
    for seed in seeds:
        start = None
        for name, schedule in variants(base).items():
            rows = report["table"].setdefault(name, {})
            if str(seed) in rows:
                continue
            one = replace(schedule, seed=seed)
            if start is None:
                start = warmed_up(model, have["training"], replace(base, seed=seed))
            adapter, _ = fit(
                model, processor, have["training"], have["fresh"], [], one, encoders=start
            )
            rows[str(seed)] = validate(model, adapter, processor, clips, one)
            _LOG.info("%s, seed %d: %s", name, seed, rows[str(seed)])
            if schedule is base:
                for kind, given in _INPUTS.items():
                    found = validate(model, adapter, processor, clips, one, **given)
                    report["inputs"].setdefault(kind, {})[str(seed)] = found
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


_INPUTS: dict[str, dict[str, bool]] = {
    "text only (both media missing)": {"audio": False, "face": False},
    "text + voice": {"face": False},
    "text + face": {"audio": False},
    "shuffled media": {"shuffle": True},
}
