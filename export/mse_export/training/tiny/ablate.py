"""Ablations: adapters fitted alike but for one thing, compared on the validation clips."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mse_export.training.tiny.adapter_stage import fit, validate
from mse_export.training.tiny.schedule import AdapterSchedule

if TYPE_CHECKING:
    from mse_export.training.tiny.pipeline import Run

__all__ = ["ablate", "variants"]

_LOG = logging.getLogger(__name__)


def variants(base: AdapterSchedule) -> dict[str, AdapterSchedule]:
    """The adapters that are compared."""
    return {
        "as shipped": base,
        "no TGM": replace(base, mixer=False),
        "no MSF (one scale)": replace(base, single_scale=True),
        "published layout": replace(base, layout="published"),
        "P = 1": replace(base, pseudo=1),
        "P = 2": replace(base, pseudo=2),
        "P = 8": replace(base, pseudo=8),
        "own words and voices only": replace(base, fresh_text=0.0, fresh_voice=0.0),
    }


def ablate(run: Run, *, seeds: tuple[int, ...] = (1,), steps: int = 300) -> dict[str, Any]:
    """Fit every variant for every seed; resumes from `ablations.json` in the working folder."""
    path = run.work / "ablations.json"
    have = run.material()
    report: dict[str, Any] = {
        "clips": len(have["validation"]),
        "steps": steps,
        "seeds": len(seeds),
        "table": {},
    }
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
    found = report["table"]
    for seed in seeds:
        for name, schedule in variants(run.scale.adapter).items():
            rows = found.setdefault(name, [])
            if len(rows) > seeds.index(seed):
                continue
            one = replace(schedule, seed=seed, steps=steps)
            adapter, _ = fit(
                have["model"],
                have["processor"],
                have["training"],
                have["fresh"],
                have["validation"][::2],
                one,
                every=steps,
            )
            rows.append(
                validate(have["model"], adapter, have["processor"], have["validation"], one)
            )
            _LOG.info("%s, seed %d: %s", name, seed, rows[-1])
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
