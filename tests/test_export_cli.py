"""mse-export as a command: bundles that the runtime loads, and clear errors that leave nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
pytest.importorskip("onnx")
pytest.importorskip("sentencepiece")

from export_folders import CONFIGS, make_folder  # noqa: E402

from mse_export import profiles  # noqa: E402
from mse_export.adapter import init_random  # noqa: E402
from mse_export.adapter_shapes import AdapterDims  # noqa: E402
from mse_export.cli import command  # noqa: E402
from mse_export.quant_types import quant  # noqa: E402
from mse_export.synthetic import write_synthetic  # noqa: E402
from mse_runtime.bundle import load_bundle  # noqa: E402
from mse_runtime.errors import MSEError  # noqa: E402


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def fails(match: str, code: int, *arguments: str | Path) -> None:
    """The command fails with one paragraph of the right class."""
    result = run(*arguments)
    assert isinstance(result.exception, MSEError), (result.exception, result.output)
    assert match in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.exception.exit_code == code


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("cli") / "llama-small", "llama")


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli-gguf") / "small.gguf"
    write_synthetic(path, CONFIGS["llama"] | {"vocab_size": 2000}, quant("f16"), name="small")
    return path


@pytest.fixture
def mosei(tmp_path: Path) -> Path:
    """A checkpoint in the published form for the small Llama."""
    dims = AdapterDims(64, 74, 35)
    state = {f"Model.{k}": v for k, v in init_random(dims, 1).state_dict().items()}
    torch.save(state, tmp_path / "mosei.pth")
    return tmp_path / "mosei.pth"


def test_published_checkpoint_to_a_verified_bundle(
    llama: Path, mosei: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    result = run("--backbone", llama, "--adapter", mosei, "-o", out, "--quant", "f32", "--json")
    assert result.exit_code == 0, result.exception
    data = json.loads(result.stdout)
    assert data["bundle"] == str(out)
    assert "are mosei's" in data["warnings"][0]
    bundle = load_bundle(out)
    assert bundle.layout == "published"
    assert bundle.trained
    assert bundle.backbone.gguf.type == "F32"
    assert bundle.backbone.rope_table == "bf16"
    checks = {c["name"]: c for c in bundle.parity["checks"]}
    assert {c["result"] for c in checks.values()} == {"ok"}
    assert set(checks) == {
        "adapter: torch against onnx",
        "adapter: torch against numpy",
        "prompt layout: sentiment",
        "tokeniser",
        "first-step logits",
    }
    assert "both with the exact rotary table" in checks["first-step logits"]["measured"]
    assert "2 BOS" in checks["prompt layout: sentiment"]["measured"]
    card = (out / "README.md").read_text()
    assert "| first-step logits | ok |" in card
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter.onnx",
        "adapter.safetensors",
        "backbone.gguf",
        "manifest.json",
    ]
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "chatglm", "llama3"])
def test_clips_bundle_for_every_family(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", kind)
    out = tmp_path / "out"
    result = run("--backbone", folder, "--init", "random", "-o", out, "--seed", "3")
    assert result.exit_code == 0, result.exception
    assert result.stdout.strip() == str(out)
    bundle = load_bundle(out)
    assert bundle.layout == "pseudo-last"
    assert bundle.backbone.rope_table is None
    assert bundle.training.status == "untrained"
    assert set(bundle.tasks) == {"sentiment", "emotion"}
    assert {c["result"] for c in bundle.parity["checks"]} == {"ok"}
    assert "**The adapter is untrained.**" in (out / "README.md").read_text()


def test_ready_gguf_synthetic_and_half_precision(gguf: Path, tmp_path: Path) -> None:
    options = ("--init", "random", "--onnx-precision", "fp16")
    assert run("--backbone", gguf, *options, "-o", tmp_path / "a").exit_code == 0
    first = load_bundle(tmp_path / "a")
    assert first.backbone.gguf.type == "F16"
    assert first.adapter.onnx.size < 0.6 * first.adapter.weights.size
    assert run("--backbone", gguf, *options, "--quant", "q8_0", "-o", tmp_path / "b").exit_code == 0
    assert load_bundle(tmp_path / "b").backbone.gguf.type == "Q8_0"
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(CONFIGS["qwen"] | {"vocab_size": 3000}))
    out = tmp_path / "c"
    result = run("--backbone", hf, "--synthetic", *options, "--quant", "q4_0", "-o", out)
    assert result.exit_code == 0, result.exception
    assert load_bundle(out).backbone.gguf.type == "Q4_0"


def test_existing_folders(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--backbone", gguf, "--init", "random", "--no-verify", "-o", out)
    assert run(*arguments).exit_code == 0
    before = (out / "manifest.json").read_text()
    fails("exists already", 2, *arguments)
    assert run(*arguments, "--force", "--name", "second").exit_code == 0
    assert json.loads((out / "manifest.json").read_text())["name"] == "second" != before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_text("x")
    fails("is not a bundle", 2, *arguments[:-1], other, "--force")
    assert (other / "me.jpg").exists()


def test_usage_errors(gguf: Path, llama: Path, mosei: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x")
    fails("mse-train", 2, "--backbone", gguf, *out)
    fails("not both", 2, "--backbone", gguf, "--adapter", mosei, "--init", "random", *out)
    fails("Known names: llama2-7b", 2, "--backbone", "gpt-5", "--init", "random", *out)
    fails("neither a folder nor a file", 2, "--backbone", "./none.gguf", "--init", "random", *out)
    fails("Known: f32", 2, "--backbone", llama, "--init", "random", "--quant", "q1", *out)
    fails(
        "needs --dataset", 2, "--backbone", gguf, "--init", "random", "--layout", "published", *out
    )
    fails("there are cherma", 2, "--backbone", gguf, "--init", "random", "--dataset", "imdb", *out)
    fails("takes 74 audio", 4, "--backbone", gguf, "--adapter", mosei, "--dataset", "meld", *out)
    fails("not a GGUF", 2, "--backbone", gguf, "--synthetic", "--init", "random", *out)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("x")]


def test_adapter_of_another_backbone(gguf: Path, tmp_path: Path) -> None:
    torch.save(init_random(AdapterDims(128, 13, 167), 0).state_dict(), tmp_path / "a.pth")
    out = tmp_path / "x"
    fails("width 128", 4, "--backbone", gguf, "--adapter", tmp_path / "a.pth", "-o", out)
    assert not out.exists()


def test_damaged_models_leave_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", "llama", shards=2)
    out = ("--init", "random", "-o", tmp_path / "out")
    shard = folder / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-7])
    fails("truncated", 6, "--backbone", folder, *out)
    shard.unlink()
    fails("lacks 1 of 2", 6, "--backbone", folder, *out)
    shard.write_bytes(data)
    (folder / "tokenizer.model").write_bytes(b"no model")
    fails("sentencepiece", 6, "--backbone", folder, *out)
    (folder / "tokenizer.model").unlink()
    fails("tokenizer.json", 6, "--backbone", folder, *out)
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    fails("'mamba'", 6, "--backbone", folder, *out)
    (folder / "config.json").write_text("{")
    fails("cannot be read", 6, "--backbone", folder, *out)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    fails("GGUF", 6, "--backbone", broken, *out)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_what_is_cheap_is_checked_first(
    gguf: Path, mosei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake is told before a model is looked for, let alone fetched."""
    from mse_export import pipeline

    def fetched(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was fetched")

    monkeypatch.setattr(pipeline, "fetch", fetched)
    name, out = ("--backbone", "llama2-7b"), ("-o", tmp_path / "x")
    (tmp_path / "there").mkdir()
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    random = ("--init", "random")
    fails("exists already", 2, *name, *random, "-o", tmp_path / "there")
    fails("No checkpoint at", 4, *name, "--adapter", tmp_path / "none.pth", *out)
    fails("cannot be read as a checkpoint", 4, *name, "--adapter", broken, *out)
    fails("not both", 2, *name, *random, "--adapter", mosei, *out)
    fails("No adapter was given", 2, *name, *out)
    fails("Unknown data set 'imdb'", 2, *name, *random, "--dataset", "imdb", *out)
    fails("no published configuration", 2, *name, *random, "--dataset", "iemocap", *out)
    fails("Known: f32", 2, *name, *random, "--quant", "q1", *out)
    fails("width 64, but llama2-7b has width 4096", 4, *name, "--adapter", mosei, *out)
    import shutil

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=3_000_000_000))
        fails("The language model needs 3.83 GB", 5, *name, *random, "--quant", "q4_0", *out)
    result = run(*name, *random, *out)
    assert "a model was fetched" in str(result.exception)
    assert not (tmp_path / "x.partial").exists()


def test_default_names(gguf: Path, mosei: Path, tmp_path: Path) -> None:
    from mse_export.choices import choose
    from mse_export.pipeline import Request

    def name(**options: Any) -> str:
        return str(choose(Request(**options)).output)

    assert name(backbone=str(gguf), adapter=mosei) == "small-mosei"
    assert name(backbone=str(gguf), init="random") == "small-untrained"
    assert name(backbone="qwen-1.8b", init="random", synthetic=True) == "qwen-1.8b-synthetic"


@pytest.mark.parametrize("name", profiles.backbone_names())
def test_names_offline_are_one_paragraph(name: str, tmp_path: Path) -> None:
    result = run("--backbone", name, "--init", "random", "--offline", "-o", tmp_path / "x")
    assert isinstance(result.exception, MSEError)
    message = str(result.exception)
    entry = profiles.named_backbone(name)
    assert result.exception.exit_code == 6
    assert "\n" not in message
    assert f"hf download {entry.repo} --revision {entry.revision}" in message
    assert "--synthetic" in message
    assert ("gated" in message) == entry.gated
    assert not list(tmp_path.iterdir())


def test_cached_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete snapshot in the Hugging Face cache is used, offline."""
    entry = profiles.named_backbone("qwen2.5-0.5b")
    repo = tmp_path / f"models--{entry.repo.replace('/', '--')}"
    make_folder(repo / "snapshots" / entry.revision, "qwen2")
    (repo / "refs").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    from mse_export.resolve import resolve_backbone

    source = resolve_backbone("qwen2.5-0.5b", offline=True)
    assert source.path == repo / "snapshots" / entry.revision
    assert entry.revision in source.description


def test_too_little_space_is_said_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    fails("are free there", 5, "--backbone", llama, "--init", "random", "-o", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_verification_failure_writes_nothing(
    llama: Path, mosei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that forgets to reorder rotary rows is caught, and no bundle appears."""
    from mse_export import convert

    monkeypatch.setattr(convert, "_interleaved", lambda values, heads: values)
    out = tmp_path / "x"
    fails("first-step logits", 4, "--backbone", llama, "--adapter", mosei, "-o", out)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("x")]


def test_help_and_list() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "mse-export --backbone llama2-7b" in result.output
    assert "Exit codes" in result.output
    result = run("--list", "--backbone", "x")
    assert "published: qwen-1.8b on iemocap" in result.output
    assert "q4_k_m" in result.output


def test_random_adapters_differ_by_seed(gguf: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    weights: list[dict[str, Any]] = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(i)
        arguments = ("--init", "random", "--seed", str(seed), "--no-verify", "-o", out)
        assert run("--backbone", gguf, *arguments).exit_code == 0
        weights.append(load_file(out / "adapter.safetensors"))
    name = "text_guide_mixer.text_mlp.weight"
    assert np.array_equal(weights[0][name], weights[1][name])
    assert not np.array_equal(weights[0][name], weights[2][name])


def test_what_mse_train_wrote_is_kept(gguf: Path, tmp_path: Path) -> None:
    """Prompt, feature statistics, training note and metrics come from the checkpoint."""
    import dataclasses

    from safetensors.torch import save_file

    profile = profiles.ours("llama", 7)
    audio = dataclasses.replace(profile.features.audio, mean=(0.5,) * 13, std=(2.0,) * 13)
    profile = dataclasses.replace(
        profile, name="mine", features=dataclasses.replace(profile.features, audio=audio)
    )
    about = {
        "profile": dataclasses.asdict(profile),
        "training": {"status": "trained", "note": "my data, 12 samples"},
        "validation": {"MAE": 0.5, "Corr": 0.75},
    }
    adapter = init_random(AdapterDims(64, 13, 167), 0)
    path = tmp_path / "mine.safetensors"
    save_file(adapter.state_dict(), path, {k: json.dumps(v) for k, v in about.items()})
    out = tmp_path / "out"
    result = run("--backbone", gguf, "--adapter", path, "-o", out)
    assert result.exit_code == 0, result.exception
    bundle = load_bundle(out)
    assert bundle.features.audio.mean == (0.5,) * 13
    assert bundle.text.pad_id == 7
    assert bundle.training.note == "my data, 12 samples"
    assert bundle.parity["validation"] == about["validation"]
    assert "| MAE | 0.5000 |" in (out / "README.md").read_text()
    fails(
        "trained with the layout", 2, "--backbone", gguf, "--adapter", path, "--layout", "published"
    )
