"""Checkpoints and profiles: what goes into a bundle besides the language model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import detgen, relative_error

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from mse_export import profiles  # noqa: E402
from mse_export.adapter import adapter_from_state, init_random  # noqa: E402
from mse_export.adapter_shapes import AdapterDims  # noqa: E402
from mse_export.checkpoint import read_checkpoint  # noqa: E402
from mse_runtime.errors import BundleError, UsageError  # noqa: E402

DIMS = AdapterDims(64, 5, 7, 6, 4, 3)


def published_state() -> dict[str, Any]:
    """As the published trainer saves it, with a buffer of the frozen model."""
    state = {f"Model.{k}": v for k, v in init_random(DIMS, 0).state_dict().items()}
    buffer = "Model.LLM.model.transformer.rotary_pos_emb.inv_freq"
    return state | {buffer: torch.zeros(32, dtype=torch.float16)}


def test_published_checkpoint(test_data: Callable[[str], Path]) -> None:
    """The published trainer's own file: its outputs, with a batch of one and of five."""
    folder = test_data("golden/checkpoint/qwen-meld")
    checkpoint = read_checkpoint(folder / "adapter.pth")
    assert checkpoint.dims == AdapterDims(2048, 64, 64, 32, 16, 2)
    shapes = json.loads((folder / "state_dict_shapes.json").read_text())
    assert {f"Model.{k}": list(v.shape) for k, v in checkpoint.state.items()} == shapes
    info = json.loads((folder / "info.json").read_text())
    io = np.load(folder / "io.npz", allow_pickle=False)
    adapter = adapter_from_state(checkpoint.state)
    for batch in (1, 5):
        case = info["cases"][str(batch)]
        inputs = {
            "audio": detgen(case["seed_audio"], (batch, 157, 64)),
            "audio_len": io[f"b{batch}_audio_len"],
            "video": detgen(case["seed_video"], (batch, 32, 64)),
            "video_len": io[f"b{batch}_video_len"],
            "text": detgen(case["seed_text"], (batch, 65, 2048)),
            "text_len": np.full(batch, 65, np.int64),
        }
        with torch.inference_mode():
            found = adapter.trace(**{k: torch.from_numpy(v) for k, v in inputs.items()})
        for name, value in found.items():
            expected = io[f"b{batch}_{name}"].reshape(value.shape)
            assert relative_error(value.numpy(), expected) <= 1e-5, name


def test_formats_and_stray_keys(tmp_path: Path) -> None:
    state = published_state()
    plain = {k.removeprefix("Model."): v for k, v in state.items() if "LLM" not in k}
    torch.save(state, tmp_path / "a.pth")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "b.pt")
    save_file(plain, tmp_path / "c.safetensors", metadata={"dataset": '"clips"', "note": "x y"})
    save_file({f"module.{k}": v.half() for k, v in state.items()}, tmp_path / "d.safetensors")
    found = {p.name: read_checkpoint(p) for p in sorted(tmp_path.iterdir())}
    for name, checkpoint in found.items():
        assert checkpoint.dims == DIMS, name
        assert list(checkpoint.state) == list(plain)
        assert all(v.dtype == torch.float32 for v in checkpoint.state.values())
    assert found["a.pth"].ignored == ("Model.LLM.model.transformer.rotary_pos_emb.inv_freq",)
    assert found["c.safetensors"].metadata == {"dataset": "clips", "note": "x y"}


class Evil:
    """A pickle that would create a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    torch.save({"Model.audio_LSTM.rnn.weight_ih_l0": Evil(target)}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(target)))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(BundleError) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not target.exists()
    with pytest.raises(BundleError, match="nothing in it was executed"):
        read_checkpoint(tmp_path / "zip.pth")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    state = published_state()
    torch.save(state, tmp_path / "whole.pth")
    save_file(dict(state), tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        data = (tmp_path / name).read_bytes()
        for cut in (0, 10, len(data) // 2, len(data) - 5):
            path = tmp_path / f"cut{cut}{Path(name).suffix}"
            path.write_bytes(data[:cut])
            with pytest.raises(BundleError, match="cannot be read as a checkpoint"):
                read_checkpoint(path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BundleError, match="list, not a state dict"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"lm_head.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(BundleError, match=r"no parameter 'audio_LSTM\.rnn\.weight_ih_l0'"):
        read_checkpoint(tmp_path / "other.pth")
    del state["Model.mutli_scale_fusion.scale3.2.bias"]
    torch.save(state, tmp_path / "missing.pth")
    with pytest.raises(BundleError, match=r"scale3\.2\.bias' is missing"):
        read_checkpoint(tmp_path / "missing.pth")
    nan = published_state()
    nan["Model.video_LSTM.linear.bias"][0] = float("nan")
    torch.save(nan, tmp_path / "nan.pth")
    with pytest.raises(BundleError, match="diverged"):
        read_checkpoint(tmp_path / "nan.pth")
    with pytest.raises(BundleError, match="No checkpoint at"):
        read_checkpoint(tmp_path / "nothing.pth")


FAMILY = {"MSE-Llama2-7B": "llama", "MSE-Qwen-1.8B": "qwen", "MSE-ChatGLM3-6B": "chatglm"}


def test_every_published_configuration(test_data: Callable[[str], Path]) -> None:
    """Against the published tables: prompts to the character, widths, lengths, labels."""
    configs = json.loads(test_data("spec/published-configs.json").read_text())
    runs = 0
    for key, config in configs.items():
        backbone, dataset = key.split("/")
        family = FAMILY[backbone]
        if not config["runnable"]:
            with pytest.raises(UsageError, match="no published configuration"):
                profiles.published(family, dataset, 0)
            continue
        runs += 1
        profile = profiles.published(family, dataset, 0)
        task = profile.tasks[profile.default_task]
        assert task.prompt[-1].text == config["task_specific_prompt"]
        assert task.kind == config["train_mode"]
        assert task.max_new_tokens == config["max_new_tokens"]
        width, audio, video = config["feature_dims"]
        assert profile.dims(width) == AdapterDims(
            width,
            audio,
            video,
            config["a_lstm_hidden_size"],
            config["v_lstm_hidden_size"],
            config["pseudo_tokens"],
        )
        assert [
            profile.text.max_tokens,
            profile.features.audio.max_steps,
            profile.features.face.max_steps,
        ] == config["seq_lens"]
        names = {label.name: int(label.text) for label in task.labels}
        assert names == config.get("label_index_mapping", {})
        wrapper = "Multimodal" if config["language"] == "en" else "多模态"
        assert sum(wrapper in (s.text or "") for s in task.prompt[:-1]) == 2
    assert runs == len(profiles.published_runs()) == 13


def test_blank_runs_are_kept() -> None:
    """Line continuations of the published configuration: 45 and 49 blanks."""
    for family, dataset, blanks in (
        ("llama", "meld", 45),
        ("chatglm", "meld", 49),
        ("qwen", "iemocap", 49),
        ("qwen", "meld", 45),
    ):
        text = profiles.published(family, dataset, 0).tasks["emotion"].prompt[-1].text or ""
        assert " " * blanks in text
        assert " " * (blanks + 1) not in text


def test_published_layouts() -> None:
    llama = profiles.published("llama", "mosei", 0).tasks["sentiment"].prompt
    assert [s.bos for s in llama] == [True, True, False, False, False, False]
    assert [s.slot for s in llama] == [None, None, "pseudo", "text", None, None]
    glm = profiles.published("chatglm", "simsv2", 0).tasks["sentiment"].prompt
    assert [s.text for s in glm[:2]] == ["[gMASK]sop", "{问题}\n\n <多模态>"]
    assert glm[0].special
    qwen = profiles.published("qwen", "mosei", 151643)
    assert qwen.tasks["sentiment"].number_format == "{:+.1f}"
    assert (qwen.text.pad, qwen.text.pad_id, qwen.text.special) == ("left", 151643, True)
    assert not any(s.bos for s in qwen.tasks["sentiment"].prompt)


def test_rotary_tables_of_the_published_runs() -> None:
    """transformers rounds its own (Llama, Qwen 2); the code that comes with Qwen does not."""
    found = {arch: profiles.published_rope_table(arch) for arch in ("llama", "qwen2")}
    assert found == {"llama": "bf16", "qwen2": "bf16"}
    assert profiles.published_rope_table("qwen") is None
    assert profiles.published_rope_table("chatglm") is None


def test_guessing_the_data_set() -> None:
    assert profiles.guess_datasets("llama", AdapterDims(4096, 74, 35)) == ["mosei"]
    meld = AdapterDims(2048, 64, 64, 32, 16, 2)
    assert profiles.guess_datasets("qwen", meld) == ["meld", "iemocap"]
    iemocap = AdapterDims(2048, 64, 64, 32, 32, 4)
    assert profiles.guess_datasets("qwen", iemocap) == ["iemocap", "meld"]
    assert profiles.guess_datasets("llama", AdapterDims(4096, 3, 4)) == []


@pytest.mark.parametrize("family", ["llama", "qwen", "chatglm"])
def test_our_profiles_put_pseudo_tokens_last(family: str) -> None:
    profile = profiles.ours(family)
    assert set(profile.tasks) == {"sentiment", "emotion"}
    for task in profile.tasks.values():
        slots = [s.slot for s in task.prompt if s.slot]
        assert slots == ["text", "pseudo"]
        assert task.prompt[-2].slot == "pseudo"


def test_only_published_profiles_parse_special_spellings() -> None:
    """As their tokenisers did (ChatGLM3's did not); under ours a transcript is only ever text."""
    special = {
        family
        for family in profiles.FAMILIES
        for _, dataset in profiles.published_runs(family)
        if profiles.published(family, dataset, 0).text.special
    }
    assert special == {"llama", "qwen"}
    assert not any(profiles.ours(family).text.special for family in profiles.FAMILIES)


@pytest.mark.parametrize("name", profiles.backbone_names())
def test_named_backbones_are_complete(name: str) -> None:
    from mse_export.backbones import architecture

    entry = profiles.named_backbone(name)
    module = architecture(entry.config)
    assert len(entry.revision) == 40
    assert set(entry.revision) <= set("0123456789abcdef")
    recipes = module.tensors(entry.config)
    assert len({r.name for r in recipes}) == len(recipes)
    assert entry.pad_id < recipes[0].shape[0]
