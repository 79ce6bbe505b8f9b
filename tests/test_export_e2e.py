"""End to end on the golden folders: mse-export's pipeline, the runtime's backbone, prompt, adapter.

Logits of the published implementation are the yardstick: F16 within 0.05 at the first step and the
same greedy ids, F32 with an F32 cache within 5e-3, Q8_0 the same ids wherever the reference's best
is more than 1 ahead. ChatGLM3 is held against standard decoding (published-model spec, 4.1).

The published Llama 2 and Qwen 2 runs round their rotary table to bf16, which no GGUF can say:
there the 5e-3 are asked of llama.cpp with that rounding done in its graph (`rope_rounding`), and,
with the exact table that the runtime uses, of our plain forward pass.
"""

from __future__ import annotations

import json
import lzma
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import detgen, relative_error
from numpy.typing import NDArray
from rope_rounding import rounded_rope

pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime")

from mse_export.hf_folder import HfFolder
from mse_export.pipeline import Request, export
from mse_export.reference_lm import ReferenceLM
from mse_export.reference_tokenizer import reference_tokenizer, sample_strings
from mse_runtime import prompt
from mse_runtime.adapter import open_adapter
from mse_runtime.backbone import Backbone
from mse_runtime.bundle import Bundle, load_bundle

DATASETS = {"llama": "mosei", "qwen": "meld", "chatglm": "mosei"}
BACKBONES = tuple(DATASETS)


@dataclass(frozen=True)
class Golden:
    """One backbone's folder, checkpoint and reference output."""

    name: str
    folder: Path
    checkpoint: Path
    info: dict[str, Any]
    io: dict[str, NDArray[Any]]

    @property
    def logits(self) -> NDArray[np.float32]:
        """[samples, steps, n_vocab] under standard decoding along `path`."""
        key = "scores" if "scores" in self.io else "logits_standard_teacher_forced"
        return self.io[key]

    @property
    def path(self) -> NDArray[np.int64]:
        """[samples, steps]: the ids that were fed back."""
        return self.io["ids_authors"] if "ids_authors" in self.io else self.io["sequences"][:, 1:]

    @property
    def greedy(self) -> NDArray[np.int64]:
        """[samples, steps]: ids of standard greedy decoding."""
        key = "ids_standard_greedy"
        return self.io[key] if key in self.io else self.io["sequences"][:, 1:]


@pytest.fixture(scope="session")
def goldens(
    test_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Golden]]:
    """Folders are unpacked once, on demand, and removed at the end: they are 560 MB."""
    source, root = test_data("golden/e2e"), tmp_path_factory.mktemp("e2e")

    def get(name: str) -> Golden:
        dataset, folder = DATASETS[name], root / name
        if not folder.exists():
            folder.mkdir()
            for path in (source / name / "model").iterdir():
                if path.suffix != ".xz":
                    shutil.copyfile(path, folder / path.name)
                    continue
                with lzma.open(path) as packed, (folder / path.stem).open("wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
        return Golden(
            name,
            folder,
            source / name / f"adapter-{dataset}.pth",
            json.loads((source / name / f"info-{dataset}.json").read_text()),
            dict(np.load(source / name / f"io-{dataset}.npz", allow_pickle=False)),
        )

    yield get
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def bundles(
    goldens: Callable[[str], Golden], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], Bundle]]:
    """Exported (and so verified) once per backbone and type."""
    root = tmp_path_factory.mktemp("bundles")

    def get(name: str, kind: str) -> Bundle:
        path = root / f"{name}-{kind}"
        if not path.exists():
            golden = goldens(name)
            source = golden.folder if kind != "q8_0" else get(name, "f16").gguf_path()
            request = Request(
                str(source),
                output=path,
                dataset=DATASETS[name],
                adapter=golden.checkpoint,
                quant=kind,
                threads=1,
                verify=kind == "f16",
            )
            export(request)
        return load_bundle(path)

    yield get
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def keep_hashes(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bundles live as long as the session, so their remembered hashes may as well."""
    monkeypatch.setenv("MSE_CACHE", str(tmp_path_factory.getbasetemp() / "e2e-cache"))


def features(golden: Golden, name: str) -> NDArray[np.float32]:
    info = golden.info
    values = detgen(info[f"seed_{name}"], tuple(info[f"{name}_shape"]))
    if name in golden.io:
        assert np.array_equal(values, golden.io[name])
    return values


def prompt_rows(
    golden: Golden, bundle: Bundle, model: Backbone, tolerance: float = 1e-5
) -> Iterator[NDArray[np.float32]]:
    """Each sample's rows, as the runtime builds them; ids, pseudo tokens and rows checked.

    A quantised embedding table moves the rows, and through the text the pseudo tokens.
    """
    adapter = open_adapter(bundle, "onnx")
    audio, video = features(golden, "audio"), features(golden, "video")
    task, io = bundle.task, golden.io
    for i, text in enumerate(golden.info["raw_text"]):
        built = prompt.build(model, task.prompt, bundle.text, text, bundle.adapter.n_pseudo)
        assert np.array_equal(built.text_ids, io["text_ids"][i, 0])
        one = slice(i, i + 1)
        pseudo = adapter(
            audio[one],
            io["audio_len"][one],
            video[one],
            io["video_len"][one],
            model.embed(built.text_ids)[None],
            np.array([len(built.text_ids)], np.int64),
        )[0]
        assert relative_error(pseudo, io["pseudo"][i]) <= tolerance
        rows = built.rows(model.embed, pseudo)
        assert rows.shape == io["inputs_embeds"][i].shape
        assert relative_error(rows, io["inputs_embeds"][i]) <= tolerance
        yield rows


def forced(model: Backbone, rows: NDArray[np.float32], path: NDArray[np.int64]) -> Any:
    """Logits at each step while `path` is fed back: [steps, n_vocab]."""
    model.clear()
    logits = [model.prefill(rows)]
    logits += [model.prefill(np.array([token], np.int32)) for token in path[:-1]]
    return np.stack(logits)


@pytest.mark.parametrize("name", BACKBONES)
def test_f16(
    name: str, goldens: Callable[[str], Golden], bundles: Callable[[str, str], Bundle]
) -> None:
    golden, bundle = goldens(name), bundles(name, "f16")
    assert [c["result"] for c in bundle.parity["checks"]] == ["ok"] * 5
    with Backbone.open(
        bundle.gguf_path(), n_ctx=256, threads=1, flash_attention=False, low_memory=True
    ) as model:
        for i, rows in enumerate(prompt_rows(golden, bundle, model)):
            found = forced(model, rows, golden.path[i])
            assert np.abs(found[0] - golden.logits[i, 0]).max() <= 0.05
            assert np.array_equal(found.argmax(-1), golden.logits[i].argmax(-1))
            model.clear()
            logits, ids = model.prefill(rows), []
            for _ in range(golden.greedy.shape[1]):
                ids.append(int(logits.argmax()))
                logits = model.prefill(np.array(ids[-1:], np.int32))
            assert ids == golden.greedy[i].tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_f32_with_an_f32_cache(
    name: str, goldens: Callable[[str], Golden], bundles: Callable[[str, str], Bundle]
) -> None:
    golden, bundle = goldens(name), bundles(name, "f32")
    folder = HfFolder(golden.folder)
    exact = ReferenceLM(folder, round_bf16=True)
    rounded = ReferenceLM(folder, round_bf16=True, rope_bf16=True)
    with Backbone.open(
        bundle.gguf_path(), n_ctx=256, threads=1, kv_type="f32", low_memory=True
    ) as model:
        for i, rows in enumerate(prompt_rows(golden, bundle, model)):
            if i not in (0, 3):
                continue
            found = forced(model, rows, golden.path[i])
            if name == "chatglm":
                assert np.abs(found - golden.logits[i]).max() <= 5e-3
                continue
            assert np.abs(found - golden.logits[i]).max() <= 0.06
            if i == 3:  # the sample with the largest difference
                fed = np.concatenate([rows, model.embed(golden.path[i][:-1])])
                expected = exact.logits(fed, last=len(found))
                assert np.abs(found - expected).max() <= 5e-3
                expected = rounded.logits(fed, last=len(found))
                assert np.abs(expected - golden.logits[i]).max() <= 5e-3


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_f32_with_the_published_rotary_table(
    name: str, goldens: Callable[[str], Golden], bundles: Callable[[str, str], Bundle]
) -> None:
    """The runtime as it is, llama.cpp's own graph, and the published rounding done in it."""
    golden, bundle = goldens(name), bundles(name, "f32")
    with (
        rounded_rope() as rounding,
        Backbone.open(
            bundle.gguf_path(), n_ctx=256, threads=1, kv_type="f32", low_memory=True
        ) as model,
    ):
        for i, rows in enumerate(prompt_rows(golden, bundle, model)):
            rounding.seen.clear()
            found = forced(model, rows, golden.path[i])
            expected = [f"{q}cur-{layer}" for layer in range(model.n_layer) for q in "QK"]
            assert sorted(rounding.seen) == sorted(expected * golden.path.shape[1])
            assert np.abs(found - golden.logits[i]).max() <= 5e-3
    assert rounding.largest > 1e-3


@pytest.mark.parametrize("name", BACKBONES)
def test_q8_0(
    name: str, goldens: Callable[[str], Golden], bundles: Callable[[str, str], Bundle]
) -> None:
    golden, bundle = goldens(name), bundles(name, "q8_0")
    clear = 0
    with Backbone.open(
        bundle.gguf_path(), n_ctx=256, threads=1, flash_attention=False, low_memory=True
    ) as model:
        for i, rows in enumerate(prompt_rows(golden, bundle, model, 0.01)):
            found = forced(model, rows, golden.path[i])
            for step, reference in enumerate(golden.logits[i]):
                second, first = np.sort(reference)[-2:]
                if first - second > 1:
                    clear += 1
                    assert int(found[step].argmax()) == int(reference.argmax())
    assert clear >= 3


@pytest.mark.parametrize("name", BACKBONES)
def test_our_reference_equals_the_published_logits(
    name: str, goldens: Callable[[str], Golden]
) -> None:
    """The plain forward pass that `verify` uses, itself held against the published numbers."""
    golden = goldens(name)
    reference = ReferenceLM(HfFolder(golden.folder), round_bf16=True, rope_bf16=name != "chatglm")
    found = reference.logits(golden.io["inputs_embeds"][0])[-1]
    assert np.abs(found - golden.logits[0, 0]).max() <= 1e-4


@pytest.mark.parametrize("name", BACKBONES)
def test_tokeniser(
    name: str, goldens: Callable[[str], Golden], bundles: Callable[[str, str], Bundle]
) -> None:
    """A thousand strings, and every id that the published code saw."""
    golden, bundle = goldens(name), bundles(name, "f16")
    encode = reference_tokenizer(golden.folder, bundle.backbone.arch)
    with Backbone.open(bundle.gguf_path(), n_ctx=256, threads=1, low_memory=True) as model:
        strings = sample_strings(1000)
        if name == "qwen":  # as its tokeniser and the runtime's prompt do
            strings = [unicodedata.normalize("NFC", text) for text in strings]
        wrong = [s for s in strings if model.tokenize(s).tolist() != encode(s)]
        assert wrong == []
        info = golden.info
        assert model.tokenize(info["prompt"]).tolist() == info["task_prompt_ids"]
        assert model.tokenize("</Multimodal>").tolist() == info["p_after_ids"]
        if name == "llama":
            assert model.tokenize("<Multimodal>", bos=True).tolist() == info["p_before_ids"]
        if name == "chatglm":
            ids = model.tokenize("[gMASK]sop", special=True).tolist()
            ids += model.tokenize("{question}\n\n <Multimodal>").tolist()
            assert ids == info["p_before_ids"]
        for text, ids in zip(
            info.get("train_label_text", []), info.get("train_label_ids", []), strict=True
        ):
            assert model.tokenize(text).tolist() == ids
