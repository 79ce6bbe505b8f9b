"""Specs as data, feature files, normalisation, and the way from a clip to features."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from media_files import two_hours, write_clip

from mse_runtime.errors import BundleError, MediaError, MSEError, UsageError
from mse_runtime.features.extract import extract, load_npz, save_npz
from mse_runtime.features.normalise import prepare
from mse_runtime.features.spec import (
    Features,
    FeatureTrack,
    encoder_spec,
    get_spec,
    is_encoder_id,
    known_specs,
    parse_spec,
)

DIMS = {
    "lld13/1": 13,
    "egemaps25/1": 25,
    "face167/1": 167,
    "openface177/1": 177,
    "mosei-covarep74/1": 74,
    "mosei-facet35/1": 35,
    "meld-mel64/1": 64,
    "meld-cnn64/1": 64,
    "cherma-wav1024/1": 1024,
    "cherma-res2048/1": 2048,
}


def track(rows: int = 6, dim: int = 13, spec: str = "lld13/1", seed: int = 0) -> FeatureTrack:
    rng = np.random.default_rng(seed)
    values = rng.normal(3, 2, (rows, dim)).astype(np.float32)
    return FeatureTrack(spec, values, np.ones(rows, np.bool_), np.arange(rows) / 20)


def wanted(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "spec": "lld13/1", "dim": 13, "max_steps": 100, "mean": None, "std": None, "clip": None,
        "nonfinite": "zero",
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


# -- specs -------------------------------------------------------------------------------------


def test_all_specs_of_the_runtime_are_there() -> None:
    assert {spec: get_spec(spec).dim for spec in known_specs()} == DIMS


@pytest.mark.parametrize("spec_id", DIMS)
def test_a_spec_says_what_its_columns_are(spec_id: str) -> None:
    spec = get_spec(spec_id)
    assert len(set(spec.names)) == spec.dim
    assert all(column.unit for column in spec.columns)
    assert spec.pooling
    assert spec.description
    assert spec.index(spec.names[-1]) == spec.dim - 1
    assert len(spec.rows()) == spec.dim
    extractable = spec_id in ("lld13/1", "egemaps25/1", "face167/1", "openface177/1")
    assert spec.extractable is extractable


def test_an_unknown_spec_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(BundleError, match=r"lld14/1.*egemaps25/1.*lld13/1"):
        get_spec("lld14/1")
    with pytest.raises(BundleError, match="Open the bundle"):
        get_spec("hf-audio:0123abcd")
    with pytest.raises(KeyError, match=r"lld13/1 has no column"):
        get_spec("lld13/1").index("jitter")


def test_encoders_get_their_width_from_the_bundle() -> None:
    spec = encoder_spec("hf-image:0123abcd", dim=8, rate=5)
    assert (spec.modality, spec.dim, spec.rate) == ("face", 8, 5)
    assert is_encoder_id(spec.id)
    assert not is_encoder_id("hf-video:0123abcd")
    with pytest.raises(BundleError):
        encoder_spec("lld13/1", dim=8, rate=5)


@pytest.mark.parametrize(
    "change",
    [
        {"modality": "smell"},
        {"columns": []},
        {"columns": [{"name": "a", "unit": "1"}, {"name": "a", "unit": "1"}]},
        {"columns": [{"name": "a", "unit": "1", "fidelity": "perfect"}]},
        {"columns": [{"unit": "1"}]},
        {"rate": "often"},
    ],
)
def test_broken_specs_are_refused(change: dict[str, Any]) -> None:
    good = {
        "id": "x/1", "modality": "audio", "rate": 1, "pooling": "none", "description": "d",
        "extractable": False, "columns": [{"name": "a", "unit": "1"}],
    }  # fmt: skip
    assert parse_spec(good).dim == 1
    with pytest.raises(BundleError):
        parse_spec({**good, **change})


def test_a_track_keeps_its_lengths_together() -> None:
    with pytest.raises(ValueError, match="a track needs"):
        FeatureTrack("lld13/1", np.zeros((3, 13), np.float32), np.ones(2, np.bool_), np.zeros(3))


# -- normalisation -----------------------------------------------------------------------------


def test_statistics_clamp_and_mask() -> None:
    raw = track()
    raw.values[2, 4] = 1e6
    raw.valid[3] = False
    mean, std = tuple(range(13)), tuple(np.linspace(0.5, 2, 13))
    values, length = prepare(raw, wanted(mean=mean, std=std, clip=5.0))
    expected = np.clip((raw.values - np.array(mean)) / np.array(std), -5, 5)
    expected[3] = 0
    assert length == 6
    assert values == pytest.approx(expected, abs=1e-5)
    assert values.dtype == np.float32


def test_raw_values_pass_where_the_bundle_has_no_statistics() -> None:
    raw = track()
    values, length = prepare(raw, wanted(max_steps=4))
    assert np.array_equal(values, raw.values[:4])
    assert length == 4
    values[:] = 0
    assert raw.values.any()


@pytest.mark.parametrize("missing", ["none", "empty", "invalid", "invalid within the limit"])
def test_a_missing_modality_is_one_zero_row_of_length_0(missing: str) -> None:
    raw: FeatureTrack | None = track(0 if missing == "empty" else 6)
    if missing == "none":
        raw = None
    elif raw is not None:
        raw.valid[: 6 if missing == "invalid" else 3] = False
    values, length = prepare(raw, wanted(max_steps=3))
    assert values.shape == (1, 13)
    assert not values.any()
    assert length == 0


def test_values_that_are_not_finite() -> None:
    raw = track()
    raw.values[1, 2], raw.values[4, 0] = np.nan, -np.inf
    values, _ = prepare(raw, wanted(mean=(3.0,) * 13, std=(2.0,) * 13, clip=5.0))
    assert values[1, 2] == values[4, 0] == 0
    assert np.isfinite(values).all()
    with pytest.raises(MediaError, match="first in row 1"):
        prepare(raw, wanted(nonfinite="refuse"))
    raw.valid[[1, 4]] = False
    prepare(raw, wanted(nonfinite="refuse"))


def test_a_column_that_never_moved_in_training_stays_bounded() -> None:
    values, _ = prepare(track(), wanted(mean=(0.0,) * 13, std=(0.0,) * 13, clip=5.0))
    assert np.abs(values).max() == 5


@pytest.mark.parametrize(("spec", "dim"), [("egemaps25/1", 25), ("egemaps25/1", 13), ("", 25)])
def test_other_features_than_the_bundle_was_trained_on_are_refused(spec: str, dim: int) -> None:
    with pytest.raises(BundleError, match=r"expects lld13/1 with 13 columns"):
        prepare(track(dim=dim, spec=spec), wanted())


# -- feature files -----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    audio=hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.just(13))),
    rows=st.integers(0, 5),
    only_audio=st.booleans(),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, audio: Any, rows: int, only_audio: bool
) -> None:
    path = tmp_path_factory.mktemp("npz") / "f.npz"
    heard = FeatureTrack(
        "lld13/1", audio, np.arange(len(audio)) % 2 == 0, np.arange(len(audio)) / 2
    )
    seen = None if only_audio else track(rows, 167, "face167/1")
    info = {"fps": 5.0, "frames": np.zeros(3), "nested": {"a": [1, 2]}}
    save_npz(path, Features(heard, seen, 4.5, ("one", "zwei ü"), info))
    back = load_npz(path)
    assert back.audio is not None
    assert back.audio.spec == "lld13/1"
    assert np.array_equal(back.audio.values, audio, equal_nan=True)
    assert np.array_equal(back.audio.valid, heard.valid)
    assert np.array_equal(back.audio.times, heard.times)
    assert (back.face is None) is only_audio
    assert (back.duration, back.warnings) == (4.5, ("one", "zwei ü"))
    assert back.info == {"fps": 5.0, "nested": {"a": [1, 2]}}


def test_a_plain_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "plain.npz"
    np.savez(path, audio=np.ones((7, 74)), video=np.ones((3, 35), np.float16), label=np.ones(1))
    plain = load_npz(path)
    assert plain.audio is not None
    assert plain.face is not None
    assert (plain.audio.spec, plain.audio.values.shape) == ("", (7, 74))
    assert plain.face.values.dtype == np.float32
    assert np.isnan(plain.audio.times).all()
    assert math.isnan(plain.duration)
    named = load_npz(path, audio_spec="mosei-covarep74/1", face_spec="mosei-facet35/1")
    assert named.audio is not None
    assert named.audio.spec == "mosei-covarep74/1"


def bomb(path: Path, shape: tuple[int, ...], content: bytes = b"", dtype: str = "<f4") -> Path:
    header = BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("audio.npy", header.getvalue() + content)
    return path


def test_sizes_are_checked_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MediaError, match="is declared"):
        load_npz(bomb(tmp_path / "lie.npz", (10**9, 10**6)))
    monkeypatch.setattr("mse_runtime.features.npz.MAX_BYTES", 2**20)
    with pytest.raises(MediaError, match="over 1 MB"):
        load_npz(bomb(tmp_path / "zeros.npz", (3 * 2**20, 1), bytes(12 * 2**20)))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"text": np.ones(3)},
        {"audio": np.ones(3)},
        {"audio": np.ones((2, 3, 4))},
        {"audio": np.ones((2, 0))},
        {"audio": np.array([["a", "b"]])},
        {"audio": np.array([[{}]], dtype=object)},
        {"audio": np.ones((2, 3)), "audio_valid": np.ones(3, np.bool_)},
        {"audio": np.ones((2, 3)), "audio_times": np.ones((2, 1))},
        {"audio": np.ones((2, 3)), "info": np.array("{not json")},
    ],
)
def test_odd_feature_files_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays)
    with pytest.raises(MediaError, match=r"odd\.npz"):
        load_npz(path)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    path.write_text("no zip")
    for bad in (path, tmp_path / "missing.npz", tmp_path):
        with pytest.raises(MediaError):
            load_npz(bad)
    with pytest.raises(MediaError, match="cannot write"):
        save_npz(tmp_path / "no" / "folder.npz", Features(track(), None, 1.0))
    assert list(tmp_path.glob(".*")) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_never_does_worse_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    path = tmp_path_factory.mktemp("npz") / "f.npz"
    save_npz(path, Features(track(), track(3, 167, "face167/1"), 1.0))
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_npz(path)
    except MSEError:
        return


# -- from a clip -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seconds=3.0)


def same(a: FeatureTrack | None, b: FeatureTrack | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a.values, b.values) and np.array_equal(a.times, b.times)


def test_a_clip_without_a_face_gives_a_voice_and_an_empty_mask(clip: Path) -> None:
    features = extract(clip)
    assert features.audio is not None
    assert features.face is not None
    assert features.audio.values.shape == (60, 13)
    assert features.face.values.shape == (15, 167)
    assert not features.face.valid.any()
    assert features.duration == pytest.approx(3.0, abs=0.05)
    assert any("no face" in warning for warning in features.warnings)
    assert set(features.info["seconds"]) == {"probe", "decode", "audio", "face"}
    json.dumps(features.info)


def test_threads_change_nothing(test_data: Callable[[str], Path]) -> None:
    path = test_data("clips") / "vretalk_2.mp4"
    one, two = (extract(path, threads=n, end=2.0) for n in (1, 3))
    assert same(one.audio, two.audio)
    assert same(one.face, two.face)
    assert one.face is not None
    assert one.face.valid.all()
    assert one.warnings == two.warnings


def test_kept_frames_are_spread_and_carry_the_mesh(test_data: Callable[[str], Path]) -> None:
    features = extract(test_data("clips") / "synth_en.mp4", keep_frames=4, fps=10)
    kept = features.info["frames"]
    assert [round(k["time"], 1) for k in kept] == pytest.approx([0, 1.7, 3.5, 5.2], abs=0.5)
    assert kept[0]["image"].shape[2] == 3
    points, iris = kept[0]["mesh"]
    assert points.shape == (468, 3)
    assert iris.shape == (10, 2)


def test_only_what_is_asked_for(clip: Path) -> None:
    heard = extract(clip, face_spec=None)
    assert heard.face is None
    assert heard.warnings == ()
    seen = extract(clip, audio_spec=None, fps=2)
    assert seen.audio is None
    assert seen.face is not None
    assert len(seen.face) == 6


def test_a_window_is_on_the_clips_clock(clip: Path) -> None:
    part = extract(clip, start=1.0, end=2.0)
    assert part.audio is not None
    assert part.face is not None
    assert part.face.times == pytest.approx(1 + np.arange(5) / 5)
    assert part.audio.times[0] == pytest.approx(1.03, abs=0.001)
    assert part.duration == pytest.approx(1.0, abs=0.05)


def test_missing_modalities_are_said(tmp_path: Path) -> None:
    silent = extract(write_clip(tmp_path / "silent.mp4", audio=None))
    assert silent.audio is None
    assert "no sound" in silent.warnings[0]
    voice = extract(write_clip(tmp_path / "voice.wav", video=None, audio="pcm_s16le"))
    assert voice.face is None
    assert "no moving picture" in voice.warnings[0]
    assert voice.audio is not None
    short = extract(write_clip(tmp_path / "short.wav", video=None, audio="pcm_s16le", seconds=0.01))
    assert short.audio is None
    assert any("shorter than 20 ms" in w for w in short.warnings)


def test_a_truncated_clip_is_said_with_both_lengths(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "fast.mp4", seconds=8.0, options={"movflags": "+faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    said = extract(path).warnings
    assert any("breaks off at" in w and "declared 8.0 s" in w for w in said)


def test_the_limit_on_length_is_said(clip: Path) -> None:
    features = extract(clip, max_seconds=1.0)
    assert features.duration == pytest.approx(1.0, abs=0.05)
    assert any("--max-seconds" in w for w in features.warnings)


@pytest.mark.parametrize(
    ("specs", "error"),
    [
        ({"audio_spec": "mosei-covarep74/1"}, UsageError),
        ({"audio_spec": "face167/1"}, UsageError),
        ({"face_spec": "lld13/1"}, UsageError),
        ({"face_spec": "face168/1"}, BundleError),
    ],
)
def test_specs_that_cannot_be_computed(
    clip: Path, specs: dict[str, str], error: type[MSEError]
) -> None:
    with pytest.raises(error):
        extract(clip, **specs)  # type: ignore[arg-type]


def test_errors_in_either_thread_reach_the_caller(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mse_runtime.features import face
    from mse_runtime.media import FrameReader, SoundReader

    def broken(*_: object, **__: object) -> None:
        raise MediaError("broken here")

    for owner, name in ((SoundReader, "read"), (FrameReader, "_hold"), (face.FaceExtractor, "add")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            for threads in (1, 2):
                with pytest.raises(MediaError, match="broken here"):
                    extract(clip, threads=threads)


def test_two_hours_take_no_more_memory_than_ten_seconds(tmp_path: Path) -> None:
    film = two_hours(tmp_path / "film.mp4")
    code = (
        "import sys\n"
        "from mse_runtime.features.extract import extract\n"
        "f = extract(sys.argv[1], start=float(sys.argv[2]), end=float(sys.argv[2]) + 4)\n"
        "assert len(f.face) == 20, len(f.face)\n"
        "from mse_runtime.memory import measured\n"
        "print(measured().peak_rss / 1e6)\n"
    )
    short = two_hours(tmp_path / "short.mp4", seconds=10)
    peaks = [
        float(subprocess.check_output([sys.executable, "-c", code, str(path), start]))
        for path, start in ((film, "7100"), (short, "3"))
    ]
    # The container's index of 288,000 packets, some 70 bytes each in either of two demuxers.
    assert peaks[0] < peaks[1] + 60


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, mse_runtime.features, mse_runtime.features.extract\n"
        "heavy = {'av', 'onnxruntime', 'PIL', 'opensmile', 'torch', 'scipy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
