"""Bundles for measuring: a backbone's exact shape with random weights, in both prompt layouts.

    python bench/bundles.py --shapes qwen-1.8b --quants q4_0,q8_0 [--bundles DIR]

`published` has the layout, feature widths and prompt of the published MOSEI run; `pseudo-last` is
this project's own layout for raw clips. Both share one GGUF file (a hard link). `tiny` is built in.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, child_environment, parse, parser

CLIP = ROOT / "examples" / "happy.mp4"
TEXT = "I am really happy with how this turned out. Thank you so much for everything."


@dataclass(frozen=True)
class Pair:
    """The two bundles of one backbone."""

    shape: str
    quant: str
    published: Path
    pseudo_last: Path

    @property
    def gguf(self) -> Path:
        return self.published / "backbone.gguf"


def make(shape: str, quant: str, folder: Path) -> Pair:
    """The bundles of `shape` in `quant`, made in `folder` where they are not there yet."""
    if shape == "tiny":
        quant = "f16"
    base = folder / f"{shape}-{quant}"
    pair = Pair(shape, quant, base / "published", base / "pseudo-last")
    base.mkdir(parents=True, exist_ok=True)
    if not (pair.published / "manifest.json").exists():
        source = ["tiny"] if shape == "tiny" else [shape, "--synthetic", "--quant", quant]
        _export(*source, "--dataset", "mosei", "-o", str(pair.published))
    if not (pair.pseudo_last / "manifest.json").exists():
        _export(str(pair.gguf), "--layout", "pseudo-last", "-o", str(pair.pseudo_last))
    return pair


def remove(pair: Pair) -> None:
    """Delete the bundles: a 7B one is 4 GB."""
    shutil.rmtree(pair.published.parent, ignore_errors=True)


def _export(backbone: str, *options: str) -> None:
    """`mse-export --init random`, in a process of its own: it imports torch."""
    command = [sys.executable, "-m", "mse_export.cli", "--backbone", backbone, *options]
    command += ["--init", "random", "--no-verify", "--offline", "--force"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def features(bundle: Any) -> Any:
    """Made-up features of a clip of usual length: 8 s at the specs' rates, every row valid."""
    import numpy as np

    from mse_runtime.features.spec import Features, FeatureTrack

    rng = np.random.default_rng(0)

    def track(wanted: Any, rate: float) -> Any:
        steps = min(wanted.max_steps, int(8 * rate))
        values = rng.standard_normal((steps, wanted.dim), dtype=np.float32)
        times = np.arange(steps) / rate
        return FeatureTrack(wanted.spec, values, np.ones(steps, np.bool_), times)

    inputs = bundle.features
    return Features(track(inputs.audio, 20.0), track(inputs.face, 10.0), 8.0, (), {})


def main() -> None:
    args = parse(parser(__doc__))
    for shape in args.shapes:
        for quant in args.quants if shape != "tiny" else ["f16"]:
            pair = make(shape, quant, args.bundles)
            print(f"{pair.published.parent}  {pair.gguf.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
