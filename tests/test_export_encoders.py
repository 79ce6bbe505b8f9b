"""Encoders exported from Hugging Face folders, as the runtime uses them; adapter precisions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import detgen

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.onnx")

from export_folders import CONFIGS  # noqa: E402

from mse_export.encoders import (  # noqa: E402
    encoder_width,
    export_audio_encoder,
    export_face_encoder,
)
from mse_export.pipeline import Request, export  # noqa: E402
from mse_export.quant_types import quant  # noqa: E402
from mse_export.synthetic import write_synthetic  # noqa: E402
from mse_runtime.bundle import Bundle, load_bundle  # noqa: E402
from mse_runtime.errors import BundleError  # noqa: E402
from mse_runtime.features.encoders import open_audio_encoder, open_image_encoder  # noqa: E402


def speech_folder(path: Path, kind: str) -> Path:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 4, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=8,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(path)
    return path


def resnet_folder(path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(path)
    from transformers import ConvNextImageProcessor

    ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(path)
    return path


def clip_folder(path: Path) -> Path:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config=text | {"num_attention_heads": 2, "vocab_size": 50},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    )
    transformers.CLIPModel(config).save_pretrained(path)
    from transformers import CLIPImageProcessor

    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A whole bundle with a speech and an image encoder inside."""
    root = tmp_path_factory.mktemp("encoders")
    write_synthetic(
        root / "m.gguf", CONFIGS["llama"] | {"vocab_size": 2000}, quant("f16"), name="m"
    )
    request = Request(
        str(root / "m.gguf"),
        output=root / "out",
        init="random",
        audio_encoder=speech_folder(root / "w2v", "Wav2Vec2"),
        face_encoder=clip_folder(root / "clip"),
    )
    return export(request).bundle


def test_bundle_with_encoders(bundle: Bundle) -> None:
    loaded = load_bundle(bundle.path)
    assert [e.file for e in loaded.encoders] == ["audio_encoder.onnx", "image_encoder.onnx"]
    assert loaded.features.audio.spec == loaded.encoders[0].id
    assert (loaded.features.audio.dim, loaded.features.face.dim) == (32, 24)
    assert (loaded.adapter.audio_dim, loaded.adapter.face_dim) == (32, 24)
    assert {c["result"] for c in loaded.parity["checks"]} == {"ok", "skipped"}


@pytest.mark.parametrize("rest", [0, 1, 39])
def test_speech_encoder_equals_transformers(bundle: Bundle, rest: int) -> None:
    """The runtime's normalisation and timing over the exported graph; samples that make no row
    count as well, since the first layer's group norm sees them."""
    encoder = open_audio_encoder(bundle, bundle.features.audio.spec)
    waveform = detgen(1, (397 * 40 + 105 + rest,), 0.3)
    track = encoder(waveform)
    folder = bundle.path.parent / "w2v"
    processor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    values = processor(waveform, sampling_rate=16000, return_tensors="pt")["input_values"]
    with torch.inference_mode():
        model = transformers.Wav2Vec2Model.from_pretrained(folder).eval()
        expected = model(values).last_hidden_state[0].numpy()
    assert track.values.shape == expected.shape
    assert np.abs(track.values - expected).max() <= 1e-4 * np.abs(expected).max()


def test_image_encoder_equals_transformers(bundle: Bundle) -> None:
    encoder = open_image_encoder(bundle, bundle.features.face.spec)
    picture = ((detgen(2, (32, 32, 3)) + 1) * 127).astype(np.uint8)
    found = encoder._encode(picture[None])
    folder = bundle.path.parent / "clip"
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        model = transformers.CLIPVisionModel.from_pretrained(folder).eval()
        expected = model(**processor(picture, return_tensors="pt")).pooler_output.numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_hubert_and_resnet(tmp_path: Path) -> None:
    speech = export_audio_encoder(speech_folder(tmp_path / "hubert", "Hubert"), tmp_path)
    assert (speech.config["stride"], speech.config["receptive"]) == (40, 105)
    image = export_face_encoder(resnet_folder(tmp_path / "resnet"), tmp_path)
    assert image.config["dim"] == encoder_width(tmp_path / "resnet") == 16
    assert image.config["size"] == 64
    for info in (speech, image):
        assert info.id.split(":")[1] == info.sha256[:16]


def test_wrong_folders(tmp_path: Path) -> None:
    folder = resnet_folder(tmp_path / "resnet")
    with pytest.raises(BundleError, match=r"'resnet'.*wav2vec2, hubert"):
        export_audio_encoder(folder, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(BundleError, match="preprocessor_config"):
        export_face_encoder(folder, tmp_path)
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "config.json").write_text('{"model_type": "wav2vec2"}')
    (tmp_path / "speech" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(BundleError, match="conv_kernel"):
        export_audio_encoder(tmp_path / "speech", tmp_path)


def test_precisions_side_by_side(bundle: Bundle) -> None:
    """fp32 within the bound, fp16 near it at half the size, int8 far from it."""
    from mse_export.adapter_precision import compare

    rows: dict[str, Any] = {row.name: row for row in compare(bundle)}
    assert [*rows] == ["fp32", "fp16", "int8"]
    assert rows["fp32"].error <= 1e-5
    assert rows["fp16"].error <= 5e-3
    assert rows["int8"].error > rows["fp16"].error
    assert rows["fp16"].size < 0.6 * rows["fp32"].size
    assert dataclasses.is_dataclass(rows["int8"])
