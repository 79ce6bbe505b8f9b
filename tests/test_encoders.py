"""Neural encoders of a bundle: preprocessing, chunking, face crops, unusable configs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mse_runtime.bundle import Bundle, EncoderInfo, load_bundle
from mse_runtime.errors import BundleError, UsageError
from mse_runtime.features.encoder_config import spec_for, spec_of
from mse_runtime.features.encoders import open_audio_encoder, open_image_encoder
from mse_runtime.features.extract import extract

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

FACE_CLIP = Path(__file__).parent / "fixtures" / "face" / "synth_en.mp4"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = {"dim": 5, "size": 32, "mean": list(MEAN), "std": list(STD)}
DIM = 6


def graph(path: Path, nodes: list[Any], ins: list[Any], outs: list[Any], **weights: Any) -> None:
    from onnx import TensorProto, helper, numpy_helper

    def info(name: str, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    body = helper.make_graph(
        [helper.make_node(kind, i, o, **attributes) for kind, i, o, attributes in nodes],
        "encoder",
        [info(*each) for each in ins],
        [info(*each) for each in outs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(body, opset_imports=opset, ir_version=8), path)


@pytest.fixture(scope="module")
def audio_kernel() -> NDArray[np.float32]:
    return (np.random.default_rng(1).normal(size=(DIM, 1, 400)) / 20).astype(np.float32)


@pytest.fixture(scope="module")
def image_kernel() -> NDArray[np.float32]:
    return np.random.default_rng(2).normal(size=(5, 3, 1, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    audio_kernel: NDArray[np.float32],
    image_kernel: NDArray[np.float32],
) -> Path:
    """A speech encoder (one strided convolution) and an image encoder (mean colour, projected)."""
    where = tmp_path_factory.mktemp("encoders")
    graph(
        where / "audio.onnx",
        [
            ("Unsqueeze", ["x", "one"], ["u"], {}),
            ("Conv", ["u", "w"], ["c"], {"strides": [320], "kernel_shape": [400]}),
            ("Transpose", ["c"], ["h"], {"perm": [0, 2, 1]}),
        ],
        [("x", [1, "n"])],
        [("h", [1, "T", DIM])],
        w=audio_kernel,
        one=np.array([1], np.int64),
    )
    graph(
        where / "image.onnx",
        [
            ("GlobalAveragePool", ["x"], ["g"], {}),
            ("Conv", ["g", "w"], ["h"], {"kernel_shape": [1, 1]}),
        ],
        [("x", ["B", 3, 32, 32])],
        [("h", ["B", 5, 1, 1])],
        w=image_kernel,
    )
    return where


def entry(folder: Path, file: str, **config: Any) -> EncoderInfo:
    data = (folder / file).read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    kind = "hf-audio" if file.startswith("audio") else "hf-image"
    return EncoderInfo(f"{kind}:{sha[:12]}", file, len(data), sha, config)


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    try:
        return load_bundle(Path(__file__).parent.parent / "mse_runtime" / "data/bundles/tiny")
    except BundleError as error:
        pytest.skip(f"no built-in bundle: {error}")


def holding(tiny: Bundle, folder: Path, info: EncoderInfo) -> Bundle:
    return replace(tiny, path=folder, encoders=(info,))


def expected_audio(samples: NDArray[Any], kernel: NDArray[np.float32]) -> NDArray[Any]:
    x = samples.astype(np.float64)
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-7)
    starts = range(0, len(x) - 400 + 1, 320)
    return np.stack([kernel[:, 0] @ x[at : at + 400] for at in starts])


def test_audio_rows_and_times(
    tiny: Bundle, folder: Path, audio_kernel: NDArray[np.float32]
) -> None:
    info = entry(folder, "audio.onnx", dim=DIM)
    encoder = open_audio_encoder(holding(tiny, folder, info), info.id)
    voice = (np.random.default_rng(3).normal(size=16000) * 3000).astype(np.int16)
    track = encoder(voice, start=2.0)
    assert track.spec == info.id
    assert track.values.shape == (49, DIM)
    assert track.valid.all()
    assert np.allclose(track.values, expected_audio(voice / 32768, audio_kernel), atol=1e-4)
    assert track.times[0] == pytest.approx(2.0 + 200 / 16000)
    assert np.diff(track.times) == pytest.approx(np.full(48, 0.02))
    assert spec_of(info).rate == 50
    assert spec_of(info).dim == DIM


def test_chunks_equal_the_whole(tiny: Bundle, folder: Path) -> None:
    voice = (np.random.default_rng(4).normal(size=16000 * 5 + 123) / 10).astype(np.float32)
    tracks = []
    for seconds in (1.0, 2.5, 60):
        info = entry(folder, "audio.onnx", dim=DIM, chunk_seconds=seconds)
        tracks.append(open_audio_encoder(holding(tiny, folder, info), info.id)(voice).values)
    assert np.allclose(tracks[0], tracks[2], atol=1e-5)
    assert np.allclose(tracks[1], tracks[2], atol=1e-5)


@pytest.mark.parametrize(("samples", "rows"), [(0, 0), (1, 1), (399, 1), (400, 1), (720, 2)])
def test_short_sounds(tiny: Bundle, folder: Path, samples: int, rows: int) -> None:
    info = entry(folder, "audio.onnx", dim=DIM)
    encoder = open_audio_encoder(holding(tiny, folder, info), info.id)
    track = encoder(np.ones(samples, np.int16))
    assert track.values.shape == (rows, DIM)
    assert np.isfinite(track.values).all()
    with pytest.raises(UsageError, match="mono"):
        encoder(np.zeros((4, 2), np.float32))


def test_whole_frames_are_normalised(
    tiny: Bundle, folder: Path, image_kernel: NDArray[np.float32]
) -> None:
    info = entry(folder, "image.onnx", **IMAGE, crop="frame", batch=2)
    encoder = open_image_encoder(holding(tiny, folder, info), info.id)
    colours = [(200, 10, 90), (0, 255, 0), (7, 8, 9)]
    for index, colour in enumerate(colours):
        encoder.add(np.full((40, 60, 3), colour, np.uint8), index / 5)
    result = encoder.finish()
    normal = (np.array(colours) / 255 - MEAN) / STD
    expected = normal @ image_kernel[:, :, 0, 0].T
    assert np.abs(result.track.values - expected).max() < 1e-4
    assert result.track.valid.all()


def test_face_crops(tiny: Bundle, folder: Path, image_kernel: NDArray[np.float32]) -> None:
    import av

    info = entry(folder, "image.onnx", **IMAGE, rate=10)
    encoder = open_image_encoder(holding(tiny, folder, info), info.id, keep_mesh=True)
    empty = np.zeros((360, 360, 3), np.uint8)
    with av.open(str(FACE_CLIP)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index >= 8:
                break
            rgb = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
            encoder.add(empty if index in (3, 4) else rgb, index / 25)
    result = encoder.finish()
    assert result.track.valid.tolist() == [i not in (3, 4) for i in range(8)]
    assert not result.track.values[3:5].any()
    assert result.mesh is not None
    # the crop is mostly skin: redder than green than blue, unlike the clip's grey-blue background
    colour = result.track.values[0] @ np.linalg.pinv(image_kernel[:, :, 0, 0]).T * STD + MEAN
    assert colour[0] > colour[1] > colour[2]
    assert spec_of(info).rate == 10


def test_wrong_checkpoint_is_refused(tiny: Bundle, folder: Path) -> None:
    good = entry(folder, "audio.onnx", dim=DIM)
    liar = replace(good, id="hf-audio:0123456789ab")
    with pytest.raises(BundleError, match="another model"):
        open_audio_encoder(holding(tiny, folder, liar), liar.id)
    with pytest.raises(BundleError, match="no encoder"):
        open_audio_encoder(holding(tiny, folder, good), "hf-audio:abcdef")
    with pytest.raises(BundleError, match="no encoder"):
        spec_for("hf-image:abcdef", holding(tiny, folder, good))


def test_spec_for_knows_shipped_and_bundled(tiny: Bundle, folder: Path) -> None:
    info = entry(folder, "audio.onnx", dim=DIM)
    assert spec_for(info.id, holding(tiny, folder, info)).dim == DIM
    assert spec_for("face167/1", tiny).dim == spec_for("face167/1", None).dim == 167
    with pytest.raises(BundleError):
        spec_for(info.id, None)


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("audio.onnx", {}),
        ("audio.onnx", {"dim": 0}),
        ("audio.onnx", {"dim": True}),
        ("audio.onnx", {"dim": DIM, "sample_rate": 8000}),
        ("audio.onnx", {"dim": DIM, "colour": "red"}),
        ("audio.onnx", {"dim": DIM, "receptive": 10}),
        ("image.onnx", {"dim": 5, "size": 32}),
        ("image.onnx", {**IMAGE, "mean": [0.1, 0.2]}),
        ("image.onnx", {**IMAGE, "std": [0, 1, 1]}),
        ("image.onnx", {**IMAGE, "crop": "hand"}),
        ("image.onnx", {**IMAGE, "align": "yes"}),
    ],
)
def test_unusable_configs(folder: Path, file: str, config: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="config cannot be used"):
        spec_of(entry(folder, file, **config))


def test_width_that_is_not_the_graphs(tiny: Bundle, folder: Path) -> None:
    info = entry(folder, "audio.onnx", dim=DIM + 1)
    with pytest.raises(BundleError, match="promises"):
        open_audio_encoder(holding(tiny, folder, info), info.id)(np.ones(800, np.float32))


def test_not_a_graph(tiny: Bundle, tmp_path: Path) -> None:
    (tmp_path / "audio.onnx").write_bytes(b"nothing like a graph")
    info = entry(tmp_path, "audio.onnx", dim=DIM)
    with pytest.raises(BundleError, match="not an ONNX graph"):
        open_audio_encoder(holding(tiny, tmp_path, info), info.id)(np.ones(800, np.float32))


def test_extract_with_a_bundles_encoders(tiny: Bundle, folder: Path) -> None:
    audio = entry(folder, "audio.onnx", dim=DIM)
    image = entry(folder, "image.onnx", **IMAGE, rate=2.5)
    bundle = replace(tiny, path=folder, encoders=(audio, image))
    features = extract(FACE_CLIP, audio_spec=audio.id, face_spec=image.id, bundle=bundle)
    assert features.audio is not None
    assert features.face is not None
    assert features.audio.dim == DIM
    assert features.face.values.shape == (14, 5)
    assert features.face.valid.all()
    assert features.info["fps"] == 2.5
