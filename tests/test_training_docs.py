"""Training: the commands of docs/training.md, and the runtime on what they make."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training_cases import (  # noqa: E402
    Told,
    arguments,
    environment,
)

from mse_export.adapter import adapter_from_state  # noqa: E402
from mse_export.checkpoint import read_checkpoint  # noqa: E402
from mse_export.training.about import profile_from_metadata  # noqa: E402
from mse_export.training.examples import collate, encode  # noqa: E402
from mse_export.training.features import FeatureStore  # noqa: E402
from mse_export.training.frozen import open_frozen  # noqa: E402
from mse_export.training.objective import score_answers  # noqa: E402
from mse_export.training.run import train  # noqa: E402
from mse_runtime.readout import Readout  # noqa: E402

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent


MODULES = {
    "mse-train": "mse_export.training.cli",
    "mse-export": "mse_export.cli",
    "mse-eval": "mse_runtime.evaluate",
    "mse-run": "mse_runtime.cli",
}
MINIATURE = {"mse-train --backbone": ["--epochs", "1", "--threads", "1"]}


def newcomers_commands() -> list[str]:
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    section = text.split("## Your own clips")[1].split("\n## ")[0]
    block = section.split("```sh\n")[1].split("```")[0]
    return [line for line in block.splitlines() if line.startswith("mse-")]


def test_the_newcomers_commands(tmp_path: Path) -> None:
    """Every command of the page's first section, as it stands there, on five clips."""
    clips = {"happy": "joy", "sad": "sadness", "dull": "neutral"}
    for name in clips:
        if not (ROOT / "examples" / f"{name}.mp4").exists():
            pytest.skip("no example clips")
        shutil.copy(ROOT / "examples" / f"{name}.mp4", tmp_path)
    lines = ["clip,text,label,split,end"]
    for split in ("train", "valid", "test"):
        lines += [f"{name}.mp4,It is {label},{label},{split},1.0" for name, label in clips.items()]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    commands = newcomers_commands()
    assert {line.split()[0] for line in commands} == set(MODULES)
    outputs = []
    for line in commands:
        words = shlex.split(line)
        extra = next((v for k, v in MINIATURE.items() if line.startswith(k)), [])
        done = subprocess.run(
            [sys.executable, "-m", MODULES[words[0]], *words[1:], *extra],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            env=environment() | {"MSE_CACHE": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        outputs.append(done.stdout)
    assert "9 clips (3 train, 3 valid, 3 test)" in outputs[0]
    assert "weight_F1" in outputs[3]
    assert "q8_0" in outputs[4]
    manifest = json.loads((tmp_path / "mine-bundle" / "manifest.json").read_text("utf-8"))
    if "emotion" not in manifest["tasks"] or len(manifest["tasks"]) > 1:
        pytest.xfail("mse-export does not read the checkpoint's own profile yet")
    names = {label["name"] for label in manifest["tasks"]["emotion"]["labels"]}
    assert names == set(clips.values())


def test_training_and_runtime_give_the_same_scores(llama: Path, data: Path, tmp_path: Path) -> None:
    """What the trainer validates is what the runtime answers: PyTorch against llama.cpp, F32."""
    pytest.importorskip("llama_cpp")
    from mse_export.bundle_writer import BackboneFile, Parts, write_bundle
    from mse_export.convert import convert_and_quantize
    from mse_export.quant_types import quant
    from mse_export.watcher import Watcher
    from mse_runtime.bundle import Training, load_bundle
    from mse_runtime.datasets import load_dataset
    from mse_runtime.evaluation import score

    output = tmp_path / "m.safetensors"
    train(arguments(llama, data, output, epochs=1), Told()())
    checkpoint = read_checkpoint(output)
    profile = profile_from_metadata(checkpoint.metadata)
    assert profile is not None
    folder = tmp_path / "bundle"
    folder.mkdir()
    gguf = folder / "backbone.gguf"
    convert_and_quantize(llama, gguf, quant("f32"), round_bf16=False, watcher=Watcher())
    write_bundle(
        folder,
        Parts("mine", profile, checkpoint.state, BackboneFile(gguf, "F32"), Training("trained")),
    )
    found = load_dataset(data)
    samples = found.split("test")
    answers = score(load_bundle(folder), samples, found.info, "emotion", threads=1)
    frozen = open_frozen(llama)
    task = profile.tasks["emotion"]
    examples = encode(samples, task, profile.text, frozen.tokenizer, profile.n_pseudo)
    batch = collate(examples, FeatureStore(profile.features))
    trie = Readout.build(task, frozen.tokenizer).trie
    scores = score_answers(frozen, adapter_from_state(checkpoint.state), batch, trie)
    assert answers.log_scores == pytest.approx(scores, abs=0.02)  # F16 keys and values
    assert np.ptp(scores, axis=1).min() > 0.1
