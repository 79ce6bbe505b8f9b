"""Hugging Face folders to GGUF: weights, tokenisers and quantisation of every architecture."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("llama_cpp")

from export_folders import CONFIGS, make_folder, write_safetensors
from gguf import GGUFReader

from mse_export.backbones import architecture
from mse_export.convert import convert, convert_and_quantize
from mse_export.hf_folder import HfFolder
from mse_export.quant_types import QUANTS, Quant, Shape, file_bytes, quant, tensor_types
from mse_export.quantize import predicted_bytes, quantize
from mse_export.reference_lm import ReferenceLM
from mse_export.reference_tokenizer import reference_tokenizer, sample_strings
from mse_export.synthetic import write_synthetic
from mse_runtime.backbone import Backbone
from mse_runtime.errors import BackboneError, UsageError
from mse_runtime.gguf import Gguf

KINDS = tuple(CONFIGS)
TYPES = "tokenizer.ggml.token_type"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {kind: make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def ggufs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ggufs")
    for kind, folder in folders.items():
        convert(HfFolder(folder), root / f"{kind}.gguf", quant("f32"), round_bf16=False)
    return {kind: root / f"{kind}.gguf" for kind in folders}


def rows(reference: ReferenceLM, count: int = 24) -> Any:
    return reference.embed(np.arange(3, 3 + count) * 7 % 400)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_reference(
    kind: str, folders: dict[str, Path], ggufs: dict[str, Path]
) -> None:
    """The GGUF under llama.cpp against the plain forward pass, at every position."""
    reference = ReferenceLM(HfFolder(folders[kind]))
    inputs = rows(reference)
    expected = reference.logits(inputs, last=len(inputs))
    with Backbone.open(ggufs[kind], n_ctx=256, kv_type="f32", threads=1, low_memory=True) as model:
        assert np.array_equal(model.embed([5, 6]), reference.embed(np.array([5, 6])))
        found = model.prefill(inputs, logits="all")
    assert expected.std() > 0.5
    assert np.abs(found - expected).max() <= 5e-3
    assert np.abs(found - expected).mean() <= 3e-4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_rounded_rotary_table_equal_the_reference(
    kind: str, folders: dict[str, Path], ggufs: dict[str, Path]
) -> None:
    """Halves and pairs, whole and half heads, with factors and without, against torch's bf16."""
    exact, rounded = (
        ReferenceLM(HfFolder(folders[kind]), rope_bf16=flag) for flag in (False, True)
    )
    inputs = rows(exact, 48)
    options: dict[str, Any] = {"kv_type": "f32", "threads": 1, "low_memory": True}
    with Backbone.open(ggufs[kind], n_ctx=256, rope_table="bf16", **options) as model:
        found = model.prefill(inputs, logits="all")
    error = np.abs(found - rounded.logits(inputs, last=48)).mean()
    assert error <= 3e-4
    assert np.abs(found - exact.logits(inputs, last=48)).mean() > 3 * error


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2"])
def test_reference_equals_transformers(kind: str, folders: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = ReferenceLM(HfFolder(folders[kind]))
    inputs = rows(reference, 48)  # beyond llama3's "original context" of 32
    model = AutoModelForCausalLM.from_pretrained(folders[kind], torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(inputs_embeds=torch.from_numpy(inputs)[None]).logits[0].numpy()
    assert np.abs(reference.logits(inputs, last=48) - expected).max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_tokeniser_equals_the_folders_own(
    kind: str, folders: dict[str, Path], ggufs: dict[str, Path]
) -> None:
    """A thousand strings; spellings of special tokens stay ordinary text."""
    arch = architecture(CONFIGS[kind]).ARCH
    encode = reference_tokenizer(folders[kind], arch)
    strings = sample_strings(1000)
    with Backbone.open(ggufs[kind], n_ctx=256, threads=1, low_memory=True) as model:
        gguf = Gguf.open(ggufs[kind])
        control = {i for i, t in enumerate(gguf.array(TYPES)) if t == 3}
        spelled = [gguf.array("tokenizer.ggml.tokens")[i] for i in sorted(control)]
        assert len(spelled) >= 2
        strings += [f.format(s) for s in spelled for f in ("{}", "{0}{0}", "I love{} it", " {}\n")]
        if arch in ("qwen", "qwen2"):  # their tokenisers do, and the runtime's prompt
            strings = [unicodedata.normalize("NFC", text) for text in strings]
        found = {text: model.tokenize(text).tolist() for text in strings}
        assert not any(control.intersection(ids) for ids in found.values())
        assert [text for text in strings if found[text] != encode(text)] == []
        if arch == "chatglm":
            ids = model.tokenize("[gMASK]sop", special=True).tolist()
            pieces = Gguf.open(ggufs[kind]).array("tokenizer.ggml.tokens")
            assert [pieces[i] for i in ids] == ["[gMASK]", "sop"]
        if arch in ("qwen", "qwen2"):
            assert len(model.tokenize("<|im_start|>", special=True)) == 1


@pytest.mark.parametrize("kind", ["llama", "qwen", "chatglm"])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
def test_stored_types_survive(kind: str, stored: str, tmp_path: Path) -> None:
    """F16 and BF16 checkpoints convert bit by bit; rounding to bf16 is asked for, not implied."""
    folder = HfFolder(make_folder(tmp_path / "f", kind, dtype=stored))
    target = quant(stored.lower())
    convert(folder, tmp_path / "a.gguf", target, round_bf16=False)
    table = {t.name: t for t in GGUFReader(tmp_path / "a.gguf").tensors}
    recipe = next(
        r for r in architecture(folder.config).tensors(folder.config) if "ffn_down" in r.name
    )
    raw, _ = folder.read(recipe.source)
    assert np.asarray(table[recipe.name].data).tobytes() == raw.tobytes()

    convert(folder, tmp_path / "b.gguf", quant("f32"), round_bf16=True)
    rounded = Gguf.open(tmp_path / "b.gguf").tensor(recipe.name)
    assert not (np.ascontiguousarray(rounded).view(np.uint32) & 0xFFFF).any()
    exact = ReferenceLM(folder)._weight(recipe.source).numpy()
    assert np.abs(rounded - exact).max() <= np.abs(exact).max() * 2**-8


def test_bf16_rounds_to_nearest_even() -> None:
    import torch

    from mse_export.encode import to_bf16

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:2] = [1 + 2**-8, 1 + 3 * 2**-8]  # ties
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bf16(values), expected)


MAIN = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m")
QUANTISED = tuple(name for name in QUANTS if name not in ("f32", "f16", "bf16"))


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen", "chatglm"])
def test_predicted_types_and_sizes_are_llama_cpps(kind: str, tmp_path: Path) -> None:
    """Every tensor's type, and the file's size to the byte, for every quantisation.

    Eight layers and columns that are and aren't a multiple of 256, so that every rule and fallback
    is met.
    """
    changes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_layers": 8,
        "kv_channels": 64,
        "intermediate_size": 704 if kind == "qwen" else 352,
        "ffn_hidden_size": 352,
        "num_key_value_heads": 1 if kind == "llama3" else 4,
    }
    if kind == "llama3":
        changes["intermediate_size"] = 512
    config = CONFIGS[kind] | changes
    source = tmp_path / "source.gguf"
    write_synthetic(source, config, quant("f16"), name="x")
    recipes = architecture(config).tensors(config)
    with Gguf.open(source) as header:
        shape = Shape(header.n_layer, header.n_head // header.n_head_kv, kind == "llama3")
    for name in QUANTISED if kind == "llama" else MAIN:
        target, path = quant(name), tmp_path / f"{name}.gguf"
        predicted = predicted_bytes(source, target)
        quantize(source, path, target, threads=2 if name in MAIN else 1)
        with Gguf.open(path) as header:
            found = {info.name: info.type for info in header.tensors.values()}
        expected = {
            recipe.name: kind_.name
            for recipe, kind_ in zip(recipes, tensor_types(recipes, target, shape), strict=True)
        }
        assert found == expected, name
        assert path.stat().st_size == predicted
        theirs = llama_cpp_quantises(source, tmp_path / "theirs.gguf", target)
        assert tensor_data(path) == tensor_data(theirs), name
        path.unlink()


def llama_cpp_quantises(source: Path, path: Path, target: Quant) -> Path:
    """What llama.cpp's own tool makes of a file."""
    import ctypes

    from mse_runtime.backbone import library

    lib = library.load()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = target.ftype, 1
    names = (str(source).encode(), str(path).encode())
    assert lib.llama_model_quantize(*names, ctypes.byref(parameters)) == 0
    return path


def tensor_data(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    with Gguf.open(path) as header:
        return {t.name: data[t.offset : t.offset + t.size] for t in header.tensors.values()}


def test_synthetic_equals_the_real_files_size() -> None:
    """Llama-2-7B in Q4_0 as published by others is 3,825.8 MB: the shapes are true."""
    from mse_export.profiles import named_backbone

    config = named_backbone("llama2-7b").config
    recipes = architecture(config).tensors(config)
    types = tensor_types(recipes, quant("q4_0"), Shape(32, 1, False))
    assert round(file_bytes(recipes, types) / 1e6) == 3825
    assert sum(recipe.elements for recipe in recipes) == 6_738_415_616
    for name, parameters in (("qwen-1.8b", 1_836_828_672), ("chatglm3-6b", 6_243_584_000)):
        config = named_backbone(name).config
        assert sum(r.elements for r in architecture(config).tensors(config)) == parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["q4_0", "q4_k_m", "q8_0", "f16"])
def test_synthetic_models_run(kind: str, target: str, tmp_path: Path) -> None:
    """Finite logits of a sensible size, which depend on the input."""
    config = CONFIGS[kind] | {
        "hidden_size": 256,
        "kv_channels": 64,
        "head_dim": 64,
        "vocab_size": 4000,
        "padded_vocab_size": 4000,
    }
    path = tmp_path / "m.gguf"
    write_synthetic(path, config, quant(target), name="x", seed=1)
    with Backbone.open(path, n_ctx=256, threads=1, low_memory=True) as model:
        ids = model.tokenize("Please predict the sentiment of the movie: 3 out of 10")
        assert 8 <= len(ids) <= 40
        first = model.prefill(ids)
        model.clear()
        second = model.prefill(model.tokenize("something else"))
    assert np.isfinite(first).all()
    assert 0.1 < first.std() < 10
    assert np.abs(first - second).max() > 0.1


def test_shards_and_missing_shard(tmp_path: Path) -> None:
    whole = make_folder(tmp_path / "whole", "llama")
    split = make_folder(tmp_path / "split", "llama", shards=3)
    for name, folder in (("a", whole), ("b", split)):
        convert(HfFolder(folder), tmp_path / f"{name}.gguf", quant("f16"), round_bf16=False)
    with Gguf.open(tmp_path / "a.gguf") as first, Gguf.open(tmp_path / "b.gguf") as second:
        assert first.tensors.keys() == second.tensors.keys()
        for name in first.tensors:
            assert np.array_equal(first.tensor(name), second.tensor(name)), name
    (split / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"lacks 1 of 3 .* model-00002-of-00003"):
        HfFolder(split)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", "qwen2")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(BackboneError, match="truncated"):
        HfFolder(folder)
    for cut in (0, 5, 100):
        path.write_bytes(data[:cut])
        with pytest.raises(BackboneError, match="not a usable safetensors file"):
            HfFolder(folder)


def test_wrong_family_and_misfit(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", "llama")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(BackboneError, match=r"'gpt2'.*knows llama"):
        architecture({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(BackboneError, match=r"gate_proj.*\[96, 64\].*\[128, 64\]"):
        convert(HfFolder(folder), tmp_path / "x.gguf", quant("f16"), round_bf16=False)
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(BackboneError, match=r"no tensor .*q_proj\.bias"):
        convert(HfFolder(folder), tmp_path / "x.gguf", quant("f16"), round_bf16=False)
    for extra in ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, {"mlp_bias": True}):
        with pytest.raises(BackboneError, match="does not write"):
            architecture(config | extra).tensors(config | extra)
    assert not list(tmp_path.glob("*.gguf*"))
    with pytest.raises(UsageError, match="q4_k_m"):
        quant("q9")


def test_interrupted_conversion_is_continued(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C half-way: the second run reads only the tensors that are missing."""
    from mse_export.watcher import Watcher

    class Stop(Watcher):
        calls = 0

        def progress(self, done: int, total: int) -> None:
            self.calls += 1
            if self.calls == 9:
                raise KeyboardInterrupt

    target, out = quant("q8_0"), tmp_path / "backbone.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert_and_quantize(folders["llama"], out, target, round_bf16=False, watcher=Stop())
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["backbone.gguf.from", "backbone.gguf.partial"]

    read: list[str] = []
    original = HfFolder.read

    def counted(self: HfFolder, name: str) -> Any:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(HfFolder, "read", counted)
    convert_and_quantize(folders["llama"], out, target, round_bf16=False)
    recipes = architecture(CONFIGS["llama"]).tensors(CONFIGS["llama"])
    assert 0 < len(read) <= len(recipes) - 7
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["backbone.gguf", "backbone.gguf.from"]
    read.clear()
    convert_and_quantize(folders["llama"], out, target, round_bf16=False)
    assert read == []  # it is whole: nothing is done twice
    convert_and_quantize(folders["llama"], tmp_path / "again.gguf", target, round_bf16=False)
    assert out.read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_duplicate_tokens_are_refused() -> None:
    """llama.cpp aborts the process over a token that occurs twice."""
    from mse_export.vocab import Vocabulary

    vocabulary = Vocabulary("llama", "default", [b"a", b"b", b"a"], [1, 1, 1], [0.0] * 3)
    with pytest.raises(BackboneError, match="twice"):
        vocabulary.metadata()


@pytest.mark.parametrize(("target", "threads"), [("f16", 1), ("q4_k_m", 2)])
def test_conversion_needs_little_memory(target: str, threads: int, tmp_path: Path) -> None:
    """The peak grows by a tensor and some slabs, not by the model (290 MB of weights here).

    The mark is the kernel's for this process image: rusage's would be the parent's if that is more.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc: the peak of a process cannot be read")
    import subprocess
    import sys

    folder = make_folder(tmp_path / "f", "llama")
    config = CONFIGS["llama"] | {"hidden_size": 1024, "intermediate_size": 4096}
    config |= {"num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        r.source: np.zeros(r.shape, np.float32) for r in architecture(config).tensors(config)
    }
    write_safetensors(folder / "model.safetensors", tensors, "F32")
    size = (folder / "model.safetensors").stat().st_size
    largest = max(values.nbytes for values in tensors.values())
    del tensors
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from mse_export.convert import convert\n"
        "from mse_export.hf_folder import HfFolder\n"
        "from mse_export.quant_types import quant\n"
        "import sentencepiece, mse_export.encode\n"
        "mse_export.encode._ggml()\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) * 1024\n"
        "source, path, target, threads = sys.argv[1:]\n"
        "model, before = HfFolder(Path(source)), peak()\n"
        "convert(model, Path(path), quant(target), round_bf16=True, threads=int(threads))\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "x.gguf"), target, str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert size > 250e6
    assert 0 < int(done.stdout) < largest + 200e6
