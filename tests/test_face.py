"""Face features: parity with FaceMesh, several faces, faces that leave, odd frames, the specs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mse_runtime.errors import BundleError, UsageError
from mse_runtime.features.action_units import ACTION_UNITS, action_units
from mse_runtime.features.detector import _merge
from mse_runtime.features.face import FaceExtractor, FaceResult
from mse_runtime.features.geometry import Picture, Region, box_iou
from mse_runtime.features.landmarks import IBUG68, face_frame, gaze, neutral_mesh
from mse_runtime.features.spec import get_spec

pytest.importorskip("onnxruntime")

FIXTURES = Path(__file__).parent / "fixtures" / "face"
Frame = NDArray[np.uint8]


def read_frames(path: Path, every: int = 5) -> list[Frame]:
    """Every `every`-th frame of a clip as RGB."""
    import av

    with av.open(str(path)) as container:
        frames = enumerate(container.decode(video=0))
        return [np.asarray(f.to_ndarray(format="rgb24")) for i, f in frames if i % every == 0]


def scan(frames: Iterable[Frame], spec: str = "face167/1", **options: Any) -> FaceResult:
    extractor = FaceExtractor(spec, keep_mesh=True, **options)
    for index, frame in enumerate(frames):
        extractor.add(frame, index / 5)
    return extractor.finish()


def resized(frame: Frame, width: int, height: int, angle: float = 0.0) -> Frame:
    from PIL import Image

    turned = Image.fromarray(frame).rotate(angle, resample=Image.Resampling.BICUBIC)
    return np.asarray(turned.resize((width, height)))


def background(width: int, height: int) -> Frame:
    return np.full((height, width, 3), (84, 104, 112), np.uint8)


@pytest.fixture(scope="module")
def clip() -> list[Frame]:
    """27 frames of a drawn, talking face, 360x360."""
    return read_frames(FIXTURES / "synth_en.mp4")


@pytest.fixture(scope="module")
def whole(clip: list[Frame]) -> FaceResult:
    return scan(clip)


def column(result: FaceResult, name: str) -> NDArray[np.float32]:
    return result.track.values[:, get_spec(result.track.spec).index(name)]


def meshes(result: FaceResult) -> NDArray[np.float32]:
    """Landmarks x, y [n, 468, 2] of the frames that show the face."""
    assert result.mesh is not None
    return np.stack([pair[0][:, :2] for pair in result.mesh if pair is not None])


def mean_error(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Normalised mean error: mean landmark distance over the outer eye corners' distance."""
    eyes = np.linalg.norm(theirs[:, 33] - theirs[:, 263], axis=-1)
    return float((np.linalg.norm(ours - theirs, axis=-1).mean(1) / eyes).mean())


# --- parity with MediaPipe's FaceMesh -----------------------------------------------------------


def test_parity_with_recorded_facemesh(whole: FaceResult) -> None:
    with np.load(FIXTURES / "synth_en.npz", allow_pickle=False) as golden:
        theirs = golden["points"] / golden["units_per_pixel"]
        assert np.array_equal(golden["frames"] // 5, np.flatnonzero(whole.track.valid))
    ours = meshes(whole)
    assert mean_error(ours, theirs) < 0.002  # 0.2 %; 1 % is what is asked for
    still = np.ptp(theirs, axis=0) < 1  # a point that never moves has no correlation over time
    r = [np.corrcoef(ours[:, i, k], theirs[:, i, k])[0, 1] for i, k in np.argwhere(~still)]
    assert np.median(r) > 0.99


@pytest.mark.parametrize("name", ["sadtalker_WDA_AlexandriaOcasioCortez_000", "vretalk_2"])
def test_parity_with_live_facemesh(name: str, test_data: Callable[[str], Path]) -> None:
    mp = pytest.importorskip("mediapipe")
    frames = read_frames(test_data(f"clips/{name}.mp4"))
    network = mp.solutions.face_mesh.FaceMesh(static_image_mode=False, max_num_faces=1)
    theirs = []
    for frame in frames:
        found = network.process(frame).multi_face_landmarks[0].landmark
        theirs.append(np.array([[p.x, p.y] for p in found]) * (frame.shape[1], frame.shape[0]))
    assert mean_error(meshes(scan(frames)), np.array(theirs)) < 0.01


# --- which face, and when -----------------------------------------------------------------------


def test_one_face(whole: FaceResult) -> None:
    assert whole.track.valid.all()
    assert whole.track.values.shape == (27, 167)
    assert np.isfinite(whole.track.values).all()
    assert whole.warnings == ()
    assert [face["coverage"] for face in whole.info["faces"]] == [1.0]
    assert whole.info["detector_runs"] <= 11  # twice a second, not once a frame


@pytest.mark.parametrize("big_at", ["left", "right"])
def test_larger_of_two_faces_wins(clip: list[Frame], big_at: str) -> None:
    frames = []
    for frame in clip[:8]:
        canvas = background(640, 360)
        big, small = resized(frame, 320, 320), resized(frame, 200, 200)
        if big_at == "left":
            canvas[20:340, :320], canvas[80:280, 420:620] = big, small
        else:
            canvas[20:340, 320:], canvas[80:280, 20:220] = big, small
        frames.append(canvas)
    result = scan(frames)
    assert len(result.info["faces"]) == 2
    assert result.track.valid.all()
    assert (result.info["faces"][0]["centre"][0] < 0.5) == (big_at == "left")
    assert any("2 faces" in warning for warning in result.warnings)


def test_steadier_face_beats_a_larger_visitor(clip: list[Frame]) -> None:
    frames = []
    for index, frame in enumerate(clip[:16]):
        canvas = background(640, 360)
        canvas[40:320, 20:300] = resized(frame, 280, 280)
        if 6 <= index < 10:
            canvas[:340, 300:640] = resized(frame, 340, 340)
        frames.append(canvas)
    result = scan(frames)
    assert len(result.info["faces"]) == 2
    assert result.info["faces"][0]["frames"] == 16
    assert result.info["faces"][0]["centre"][0] < 0.5


def test_face_that_leaves_and_returns(clip: list[Frame]) -> None:
    gone = range(5, 11)
    frames = [background(360, 360) if i in gone else clip[i] for i in range(16)]
    result = scan(frames)
    assert not result.track.valid[5:11].any()
    assert result.track.valid[:5].all()
    assert result.track.valid[11:].all()
    assert not result.track.values[5:11].any()
    assert len(result.info["faces"]) == 1  # the same person, back in the same place
    assert result.mesh is not None
    assert [pair is None for pair in result.mesh] == [i in gone for i in range(16)]


def test_no_face() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 120, 160, 3), dtype=np.uint8)
    result = scan(list(noise))
    assert not result.track.valid.any()
    assert not result.track.values.any()
    assert result.info["chosen"] is None
    assert "no face" in result.warnings[0]


def test_no_frames() -> None:
    result = FaceExtractor().finish()
    assert result.track.values.shape == (0, 167)
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("name", "seen"),
    [("pyfeat_no_face.mp4", (0, 0)), ("pyfeat_face_noface.mov", (8, 18)), ("vretalk_2.mp4", 25)],
)
def test_real_clips(name: str, seen: Any, test_data: Callable[[str], Path]) -> None:
    result = scan(read_frames(test_data(f"clips/{name}")))
    low, high = seen if isinstance(seen, tuple) else (seen, seen)
    assert low <= int(result.track.valid.sum()) <= high


# --- odd frames ---------------------------------------------------------------------------------


def test_rgbx_equals_rgb(clip: list[Frame], whole: FaceResult) -> None:
    padded = [np.dstack([frame, np.full(frame.shape[:2], 77, np.uint8)]) for frame in clip[:6]]
    assert np.array_equal(scan(padded).track.values, whole.track.values[:6])


def test_threads_do_not_change_the_result(clip: list[Frame]) -> None:
    one, three = (scan(clip[:8], threads=n).track.values for n in (1, 3))
    assert np.array_equal(one, three)


def test_frame_smaller_than_the_network(clip: list[Frame], whole: FaceResult) -> None:
    result = scan([resized(frame, 96, 96) for frame in clip[:8]])
    assert result.track.valid.all()
    assert mean_error(meshes(result) * 360 / 96, meshes(whole)[:8]) < 0.05


def test_tiny_face(clip: list[Frame]) -> None:
    frames = []
    for frame in clip[:5]:
        canvas = background(640, 360)
        canvas[60:200, 250:390] = resized(frame, 140, 140)
        frames.append(canvas)
    result = scan(frames)
    assert result.track.valid.all()
    assert column(result, "box_width").max() < 0.14


def test_single_pixel_frames() -> None:
    assert not scan([np.zeros((1, 1, 3), np.uint8)] * 2).track.valid.any()


def test_alternating_resolution(clip: list[Frame], whole: FaceResult) -> None:
    frames = [frame if i % 2 else resized(frame, 240, 240) for i, frame in enumerate(clip[:10])]
    result = scan(frames)
    assert result.track.valid.all()
    assert len(result.info["faces"]) == 1
    names = slice(0, 136)
    assert np.abs(result.track.values[:, names] - whole.track.values[:10, names]).mean() < 0.02


@pytest.mark.parametrize("angle", [-25, 25])
def test_rotation_moves_roll_and_nothing_else(
    clip: list[Frame], whole: FaceResult, angle: int
) -> None:
    turned = scan([resized(frame, 360, 360, angle) for frame in clip[:5]])
    assert turned.track.valid.all()
    roll = column(turned, "roll") - column(whole, "roll")[:5]
    assert np.rad2deg(roll).mean() == pytest.approx(-angle, abs=3)  # Pillow turns anticlockwise
    shift = turned.track.values[:, :136] - whole.track.values[:5, :136]
    assert np.abs(shift).mean() < 0.03


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_what_is_no_frame_is_refused(frame: Any) -> None:
    with pytest.raises(UsageError, match="uint8"):
        Picture(frame)


# --- geometry -----------------------------------------------------------------------------------


def test_neutral_face_is_upright_and_even() -> None:
    mesh = neutral_mesh()
    assert mesh.shape == (468, 3)
    assert np.linalg.norm(mesh[33] - mesh[263]) == pytest.approx(1, abs=1e-5)
    assert mesh[33, 1] == pytest.approx(mesh[263, 1], abs=1e-5)
    assert np.abs(face_frame(mesh[None] * 50).angles).max() < 1e-4
    assert np.abs(action_units(mesh[None])).max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-0.7, 0.7)] * 3),
    scale=st.floats(10, 400),
    place=st.tuples(*[st.floats(-500, 2000)] * 2),
)
def test_pose_is_recovered(
    angles: tuple[float, float, float], scale: float, place: tuple[float, float]
) -> None:
    (a, b, c) = angles
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    seen = neutral_mesh() * scale @ (rx @ ry @ rz).T + np.array([*place, 0])
    frame = face_frame(seen[None].astype(np.float32))
    assert frame.angles[0] == pytest.approx(angles, abs=2e-3)
    assert frame.scale[0] == pytest.approx(scale, rel=1e-3)
    assert frame.centre[0] == pytest.approx(place, abs=0.05 + scale * 1e-3)
    assert np.abs(frame.points[0] - neutral_mesh()).max() < 2e-3


@settings(max_examples=40, deadline=None)
@given(
    x=st.floats(-300, 400),
    y=st.floats(-300, 400),
    side=st.floats(5, 400),
    angle=st.floats(-4, 4),
    mirror=st.booleans(),
)
def test_crop_of_any_region(x: float, y: float, side: float, angle: float, mirror: bool) -> None:
    picture = Picture(np.full((90, 120, 3), 200, np.uint8))
    crop = picture.crop(Region(x, y, side, angle), 24, mirror=mirror)
    assert crop.shape == (24, 24, 3)
    assert (crop == 200).all()  # the edge goes on for ever


def test_crop_and_back() -> None:
    ramp = np.zeros((100, 160, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(160), np.arange(100)[:, None]
    region = Region(80, 50, 48, 0.4)
    crop = Picture(ramp).crop(region, 24).astype(np.float32)
    corners = np.array([[4, 5], [20, 3], [11, 19]], np.float32)  # crop pixels, as the networks say
    back = region.to_picture(corners, 24)
    seen = np.array([crop[int(v), int(u), :2] for u, v in corners])
    assert np.abs(back - seen).max() < 1


def test_iou_and_merging() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]], np.float32)
    assert box_iou(boxes, boxes[0]) == pytest.approx([1, 1 / 3, 0], abs=1e-6)
    points = np.zeros((3, 8, 2), np.float32)
    points[:, 0] = [[0.5, 0.5], [0.52, 0.5], [0.1, 0.1]]
    points[:, 1] = 0.2
    merged = _merge(points, np.array([0.6, 0.9, 0.8], np.float32))
    assert [score for _, score in merged] == pytest.approx([0.9, 0.8])
    assert merged[0][0][0, 0] == pytest.approx((0.6 * 0.5 + 0.9 * 0.52) / 1.5, abs=1e-5)


def test_action_units_follow_the_face() -> None:
    codes = [unit.code for unit in ACTION_UNITS]
    mesh = np.stack([neutral_mesh()] * 4)
    mesh[1][[14, 17, 152], 1] += 0.15  # the jaw falls
    mesh[2][[61, 291], 0] += (-0.08, 0.08)  # the lip corners go out and up
    mesh[2][[61, 291], 1] -= 0.06
    mesh[3][[159, 386], 1] += 0.08  # the upper lids close
    moved = action_units(mesh.astype(np.float32))
    assert np.abs(moved[0]).max() < 1e-5
    assert moved[1, codes.index("AU26")] == pytest.approx(0.15, abs=1e-4)
    assert moved[1, codes.index("AU25")] > 0.1
    assert moved[2, codes.index("AU12")] > 0.1
    assert moved[2, codes.index("AU15")] < 0
    assert moved[3, codes.index("AU45")] > 0.07
    assert moved[3, codes.index("AU05")] < 0


def test_gaze_follows_the_iris() -> None:
    mesh = (neutral_mesh() * 120 + (300, 200, 0)).astype(np.float32)
    eyes = [mesh[[33, 133], :2], mesh[[362, 263], :2]]
    iris = np.concatenate([np.repeat(eye.mean(0, keepdims=True), 5, axis=0) for eye in eyes])
    width = float(np.linalg.norm(eyes[0][1] - eyes[0][0]))
    side = iris + np.array([0.1 * width, 0], np.float32)
    points = np.stack([mesh, mesh])
    seen = gaze(points, np.stack([iris, side]).astype(np.float32), face_frame(points))
    assert np.abs(seen[0]).max() < 1e-4
    assert seen[1] == pytest.approx([0.1, 0, 0.1, 0], abs=1e-3)


# --- specs --------------------------------------------------------------------------------------


def test_face167_columns() -> None:
    spec = get_spec("face167/1")
    assert spec.dim == 167
    assert spec.names[:2] == ("x_0", "x_1")
    assert spec.names[68] == "y_0"
    assert {c.fidelity for c in spec.columns if c.name.startswith("AU")} == {"proxy"}
    assert spec.names[-4:] == ("box_width", "box_height", "score", "valid")


def test_openface177_columns_in_openface_order(clip: list[Frame]) -> None:
    spec = get_spec("openface177/1")
    intensities = [c.name for c in spec.columns if c.name.endswith("_r")]
    presences = [c.name for c in spec.columns if c.name.endswith("_c")]
    assert spec.dim == 177
    assert len(intensities) == 17
    assert len(presences) == 18
    assert presences[-2:] == ["AU28_c", "AU45_c"]
    assert {c.fidelity for c in spec.columns if c.name.startswith("AU")} == {"proxy"}
    assert spec.names[:6] == ("pose_Tx", "pose_Ty", "pose_Tz", "pose_Rx", "pose_Ry", "pose_Rz")

    result = scan(clip[:5], "openface177/1")
    assert result.mesh is not None
    first = result.mesh[0]
    assert first is not None
    assert np.array_equal(result.track.values[0, 6:74], first[0][IBUG68, 0])
    assert np.array_equal(result.track.values[0, 74:142], first[0][IBUG68, 1])
    strengths, marks = result.track.values[:, 142:159], result.track.values[:, 159:]
    assert strengths.min() >= 0
    assert strengths.max() <= 5
    assert set(np.unique(marks)) <= {0.0, 1.0}
    assert 150 < column(result, "pose_Tz").mean() < 3000  # mm


@pytest.mark.parametrize("spec", ["lld13/1", "mosei-facet35/1"])
def test_specs_of_others_are_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"npz|computed"):
        FaceExtractor(spec)
    with pytest.raises(BundleError):
        FaceExtractor("face999/1")
