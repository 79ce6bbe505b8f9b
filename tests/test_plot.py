"""The picture of a clip: drawn for every kind of answer and gap, refused with a next step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mse_runtime.errors import UsageError
from mse_runtime.features.face import FaceExtractor
from mse_runtime.features.spec import Features, FeatureTrack
from mse_runtime.plot import plot_prediction

pytest.importorskip("matplotlib")

CLIP = Path(__file__).parent / "fixtures" / "face" / "synth_en.mp4"
NUMBERS = np.round(np.arange(-3, 3.05, 0.1), 1)
SHARES = np.exp(-((NUMBERS - 1) ** 2)) / np.exp(-((NUMBERS - 1) ** 2)).sum()
REGRESSION = {
    "task": "sentiment",
    "value": 1.02,
    "label": "positive",
    "probabilities": {"negative": 0.1, "neutral": 0.1, "positive": 0.8},
    "distribution": [[float(n), float(p)] for n, p in zip(NUMBERS, SHARES, strict=True)],
    "text": "It turned out well. 很好",
    "clip": "clips/one.mp4",
    "warnings": ["the face is visible in only 6 of 25 frames."],
    "bundle": {"name": "tiny"},
}
CLASSES = {
    "task": "emotion",
    "value": None,
    "label": "joy",
    "probabilities": {"joy": 0.7, "anger": 0.2, "neutral": 0.1},
    "distribution": None,
    "text": "",
    "clip": None,
    "bundle": {"name": "tiny"},
}


def sound(spec: str = "lld13/1", dim: int = 13, voiced: bool = True) -> FeatureTrack:
    rows = 40
    values = np.abs(np.random.default_rng(0).normal(size=(rows, dim))).astype(np.float32)
    if dim == 13:
        values[:, 10] = 36 * voiced
    return FeatureTrack(spec, values, np.ones(rows, np.bool_), np.arange(rows) / 20 + 0.025)


@pytest.fixture(scope="module")
def seen() -> Features:
    """Real frames and mesh of a clip whose face is gone for a while, with made-up sound."""
    import av

    extractor = FaceExtractor(keep_mesh=True)
    images = []
    with av.open(str(CLIP)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % 5 or index >= 50:
                continue
            image = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
            images.append(np.zeros_like(image) if 15 <= index < 30 else image)
            extractor.add(images[-1], index / 25)
    face = extractor.finish()
    assert face.mesh is not None
    frames = [
        {"time": i / 5, "image": image, "mesh": mesh}
        for i, (image, mesh) in enumerate(zip(images, face.mesh, strict=True))
    ]
    info = {"window": [0.0, 2.0], "frames": frames[::2]}
    return Features(sound(), face.track, 2.0, ("said once",), info)


def size_of(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
        assert pixels.std() > 10  # something is drawn
        return image.size


@pytest.mark.parametrize("prediction", [REGRESSION, CLASSES, None])
def test_picture(seen: Features, prediction: dict[str, Any] | None, tmp_path: Path) -> None:
    out = tmp_path / "answer.png"
    plot_prediction(seen, prediction, out)
    assert size_of(out) == (1320, 836)


def test_mesh_is_drawn_on_the_face(seen: Features, tmp_path: Path) -> None:
    from PIL import Image

    bare = [{**frame, "mesh": None} for frame in seen.info["frames"]]
    without = Features(seen.audio, seen.face, 2.0, (), {**seen.info, "frames": bare})
    pictures = []
    for features in (seen, without):
        plot_prediction(features, None, tmp_path / "one.png")
        with Image.open(tmp_path / "one.png") as image:
            pictures.append(np.asarray(image.convert("RGB")).astype(int))
    outline = [((p - (125, 255, 207)) ** 2).sum(-1) < 900 for p in pictures]
    assert outline[0].sum() > 200
    assert outline[1].sum() == 0


@pytest.mark.parametrize("kind", [".svg", ".pdf", ".PNG"])
def test_formats(seen: Features, kind: str, tmp_path: Path) -> None:
    out = tmp_path / f"answer{kind}"
    plot_prediction(seen, REGRESSION, out)
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    "features",
    [
        Features(None, None, 0.0),
        Features(sound(voiced=False), None, 2.0),
        Features(sound("hf-audio:0123456789ab", 8), None, 2.0),
        Features(sound("", 5), None, 2.0),
        Features(
            None,
            FeatureTrack("face167/1", np.zeros((1, 167), "f4"), np.zeros(1, "?"), np.zeros(1)),
            0.2,
        ),
    ],
)
def test_gaps_are_drawn_as_gaps(features: Features, tmp_path: Path) -> None:
    plot_prediction(features, REGRESSION, tmp_path / "gap.png")
    assert size_of(tmp_path / "gap.png") == (1320, 836)


def test_wide_and_small_frames(tmp_path: Path) -> None:
    frames = [
        {"time": i / 2, "image": np.full(shape, 90, np.uint8), "mesh": None}
        for i, shape in enumerate([(90, 640, 3), (4, 4, 3), (640, 90, 3)])
    ]
    features = Features(sound(), None, 2.0, (), {"window": [0.0, 2.0], "frames": frames})
    plot_prediction(features, None, tmp_path / "odd.png")
    assert size_of(tmp_path / "odd.png") == (1320, 836)


def test_refusals(seen: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.png"):
        plot_prediction(seen, None, tmp_path / "answer.gif")
    with pytest.raises(UsageError, match="another place"):
        plot_prediction(seen, None, tmp_path / "no" / "such" / "folder.png")
    with pytest.raises(UsageError, match="run on a clip"):
        plot_prediction(None, None, tmp_path / "answer.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"mse-runtime\[plot\]"):
        plot_prediction(seen, None, tmp_path / "answer.png")
