"""Data sets in every form, and everything that can be wrong with them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mse_runtime.datasets import (
    PUBLISHED,
    DataSetInfo,
    assign_split,
    check_samples,
    load_dataset,
    parse_label,
    summary,
)
from mse_runtime.datasets.open_format import guess_info, write_info
from mse_runtime.datasets.safe_pickle import load_pickle
from mse_runtime.errors import MediaError, UsageError

EMOTION = DataSetInfo("e", "classification", "lld13/1", "face167/1", ("sad", "glad"))


def mosei_table(count: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "raw_text": np.array([f"sentence number {i}" for i in range(count)], dtype=object),
        "audio": rng.normal(size=(count, 6, 74)).astype(np.float32),
        "vision": rng.normal(size=(count, 5, 35)).astype(np.float64),
        "audio_lengths": [int(n) for n in rng.integers(1, 7, count)],
        "vision_lengths": rng.integers(1, 6, count),
        "regression_labels": rng.uniform(-3, 3, count).astype(np.float32),
        "id": [f"v{seed}$_${i}" for i in range(count)],
    }


def meld_list(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {
            "features": {
                "text": f"line {i}",
                "audio": rng.normal(size=(8, 64)).astype(np.float32),
                "video": rng.normal(size=(3, 64)).astype(np.float32),
                "audio_len": 1 + i % 8,
                "video_len": 3,
            },
            "label": ("neutral", "joy", 6)[i % 3],
        }
        for i in range(count)
    ]


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_dict_of_splits(tmp_path: Path, protocol: int) -> None:
    tables = {"train": mosei_table(5), "valid": mosei_table(2, 1), "test": mosei_table(3, 2)}
    data = load_dataset(dump(tmp_path / "unaligned_50.pkl", tables, protocol))
    assert data.info is PUBLISHED["mosei"]
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 5,
        "valid": 2,
        "test": 3,
    }
    sample, table = data.split("train")[3], tables["train"]
    assert (sample.id, sample.text) == ("v0$_$3", "sentence number 3")
    assert sample.label == pytest.approx(float(table["regression_labels"][3]))
    held = sample.features()
    assert held.audio is not None
    assert held.face is not None
    length = table["audio_lengths"][3]
    assert np.array_equal(held.audio.values, table["audio"][3, :length])
    assert held.face.values.dtype == np.float32
    assert (held.audio.spec, held.face.spec) == ("mosei-covarep74/1", "mosei-facet35/1")


def test_lists_by_split(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("dev", 2), ("test", 3)):
        dump(tmp_path / f"meld_{split}.pkl", meld_list(count))
    data = load_dataset(tmp_path, "meld")
    assert [len(data.split(name)) for name in ("train", "valid", "test")] == [6, 2, 3]
    assert [sample.label for sample in data.split("train")[:3]] == [0.0, 4.0, 6.0]
    audio = data.split("train")[2].features().audio
    assert audio is not None
    assert len(audio) == 3
    # The widths alone also fit IEMOCAP: not guessed.
    with pytest.raises(UsageError, match="meld, iemocap"):
        load_dataset(tmp_path)


def test_bad_rows_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    table = mosei_table(5)
    table["regression_labels"][1] = 7.5
    table["audio_lengths"][2] = 99
    table["raw_text"][3] = ""
    data = load_dataset(dump(tmp_path / "m.pkl", {"train": table}))
    assert [sample.id for sample in data.split("train")] == ["v0$_$0", "v0$_$4"]
    said = summary(data.problems)
    assert "v0$_$1: the label 7.5 is out of range -3 to 3" in said
    assert "v0$_$2: a length of 99 with 6 steps stored" in said
    assert "v0$_$3: the text is ''" in said
    entries = meld_list(4)
    entries[1]["label"] = "bored"
    entries[2]["features"]["audio"] = [1, 2]
    entries.append({"label": 1})
    data = load_dataset(dump(tmp_path / "meld_train.pkl", entries), "meld")
    assert len(data.split("train")) == 2
    said = summary(data.problems)
    assert "sample 1: the label 'bored' is none of neutral, surprise" in said
    assert "sample 2: 'audio' is no matrix" in said
    assert "sample 4: is no dict" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": {"raw_text": ["a"]}}, "has no 'audio'"),
        ({"nothing": 1}, "without splits"),
        ({"train": mosei_table(2) | {"id": ["only one"]}}, "different lengths"),
        ([], "holds a list, so its split"),
    ],
)
def test_foreign_pickles(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_dataset(dump(tmp_path / "some.pkl", content))


def test_widths_of_another_set_are_refused(tmp_path: Path) -> None:
    path = dump(tmp_path / "m.pkl", {"train": mosei_table(2)})
    with pytest.raises(MediaError, match=r"\(74, 35\), which are not simsv2's \(25, 177\)"):
        load_dataset(path, "simsv2")
    with pytest.raises(UsageError, match="no published data set"):
        load_dataset(path, "imdb")


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_code_in_a_pickle_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = dump(tmp_path / "evil.pkl", {"train": Evil(f"touch {marker}")})
    with pytest.raises(MediaError, match=r"asks for (posix|nt)\.system.*nothing was executed"):
        load_dataset(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\ngetattr\n.",
        b"cnumpy\nfromfile\n.",
        b"cnumpy\nload\n.",
        b"csubprocess\nPopen\n.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cbuiltins\nbytearray\n(I100000000000\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nlist\n(I0\ntS'b'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999\ntS'b'\ntR.",
        b"Pid\n.",
        b"\x80\x04\x95",
        b"",
        b"not a pickle at all",
    ],
)
def test_hostile_and_damaged_pickles(tmp_path: Path, opcodes: bytes) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(opcodes)
    with pytest.raises(MediaError) as caught:
        load_pickle(path)
    assert str(path) in str(caught.value)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=60, deadline=None)
def test_plain_values_survive(value: Any, protocol: int) -> None:
    from mse_runtime.datasets.safe_pickle import _Unpickler

    assert _Unpickler(io.BytesIO(pickle.dumps(value, protocol))).load() == value


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_flipped_bytes_never_do_more_than_fail(data: st.DataObject) -> None:
    raw = bytearray(pickle.dumps({"a": np.arange(6.0).reshape(2, 3), "b": ["x", 1]}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(MediaError):
        path = Path(folder) / "x.pkl"
        path.write_bytes(raw)
        load_pickle(path)  # any other exception fails the test


def write_manifest(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "manifest.csv"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def feature_file(path: Path, steps: int = 4) -> str:
    np.savez(
        path,
        audio=np.ones((steps, 13), np.float32),
        video=np.ones((steps, 167), np.float32),
    )
    return path.name


def test_the_open_format(tmp_path: Path) -> None:
    file = feature_file(tmp_path / "a.npz")
    rows = [
        {"features": file, "text": 'He said: "fine", twice', "label": "0.4", "split": "dev"},
        {"features": file, "text": "日本語 🙂", "label": "-1", "id": "b"},
        {"features": "gone.npz", "text": "x", "label": "0"},
        {"features": file, "text": "", "label": "0"},
        {"features": file, "text": "x", "label": "2", "split": "holdout"},
        {"features": file, "text": "again", "label": "1", "id": "b"},
        {"features": "", "text": "no source", "label": "1"},
    ]
    data = load_dataset(write_manifest(tmp_path, rows))
    assert data.info.range == (-3.0, 3.0)
    (first,) = data.split("valid")
    assert first.text == 'He said: "fine", twice'
    assert sum(map(len, data.splits.values())) == 2
    said = summary(data.problems, 10)
    for piece in (
        "line 4: there is no file",
        "line 5: the text is empty",
        "line 6: the split 'holdout' is none of",
        "line 7: the id 'b' stands twice",
        "line 8: names neither features nor clip",
    ):
        assert piece in said
    assert load_dataset(tmp_path).info == load_dataset(tmp_path / "manifest.csv").info


def test_features_are_read_from_the_row(tmp_path: Path) -> None:
    pytest.importorskip("mse_runtime.features.extract")
    rows = [{"features": feature_file(tmp_path / "a.npz", 7), "text": "x", "label": "glad"}]
    rows.append(rows[0] | {"label": "sad"})
    data = load_dataset(write_manifest(tmp_path, rows))
    sample = next(row for rows in data.splits.values() for row in rows)
    audio = sample.features().audio
    assert audio is not None
    assert audio.values.shape == (7, 13)


def test_what_a_label_column_asks() -> None:
    assert guess_info(["0.5", "-1"], "x").range == (-1.0, 1.0)
    assert guess_info(["2", "-1", ""], "x").range == (-3.0, 3.0)
    assert guess_info(["joy", "anger", "joy", ""], "x").labels == ("anger", "joy")
    assert guess_info(["0", "1"], "x", "classification").labels == ("0", "1")


def test_the_description_wins_over_the_guess(tmp_path: Path) -> None:
    file = feature_file(tmp_path / "a.npz")
    write_manifest(tmp_path, [{"features": file, "text": "x", "label": "glad", "split": "test"}])
    write_info(tmp_path / "dataset.json", EMOTION)
    data = load_dataset(tmp_path)
    assert data.info == EMOTION
    assert data.split("test")[0].label == 1.0
    (tmp_path / "dataset.json").write_text('{"schema": "mse-dataset/1", "kind": "poetry"}')
    with pytest.raises(MediaError, match="poetry"):
        load_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(MediaError, match="no data set description"):
        load_dataset(tmp_path)


def test_one_npz(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    arrays: dict[str, Any] = {
        "text": np.array(["one", "two", "three"]),
        "label": np.array(["glad", "sad", "glad"]),
        "audio": np.ones((3, 5, 13), np.float32),
        "video": np.ones((3, 4, 167), np.float32),
        "audio_len": np.array([5, 0, 9]),
        "split": np.array(["train", "train", "train"]),
    }
    np.savez(path, **arrays)
    data = load_dataset(path)
    first, second = data.split("train")
    assert (first.label, second.label) == (0.0, 1.0)
    assert second.features().audio is None  # length 0: nothing was heard
    assert "audio_len is 9 with 5 steps" in summary(data.problems)
    np.savez(path, text=np.array(["one"]), audio=arrays["audio"])
    with pytest.raises(MediaError, match="lacks video"):
        load_dataset(path)
    np.savez(path, **(arrays | {"label": np.array([1, 2])}))
    with pytest.raises(MediaError, match="'label' has"):
        load_dataset(path)
    np.savez(path, **(arrays | {"text": np.array(["a", None], dtype=object)}))
    with pytest.raises(MediaError, match="plain arrays"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"clip,words\na.mp4,hi\n", "needs a header line"),
        (b"", "needs a header line"),
        (b"clip,text\nb.mp4,caf\xe9\n", "not UTF-8"),
        (b"clip,text\n", "no row"),
    ],
)
def test_bad_csv(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=message):
        load_dataset(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no data set at"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(MediaError, match="is no data set"):
        load_dataset(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({}))
    with pytest.raises(MediaError, match="is no data set"):
        load_dataset(tmp_path / "x.json")


def test_labels() -> None:
    assert parse_label(" glad ", EMOTION) == 1.0
    assert parse_label(np.int64(1), EMOTION) == 1.0
    for bad in ("happy", 2, -1, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"the label .* is"):
            parse_label(bad, EMOTION)
    for bad in (3.01, "much", math.nan, math.inf):
        with pytest.raises(ValueError, match=r"the label"):
            parse_label(bad, PUBLISHED["mosei"])


def test_a_class_without_a_sample_is_named(tmp_path: Path) -> None:
    data = load_dataset(dump(tmp_path / "meld_train.pkl", meld_list(6)), "meld")
    said = summary(check_samples(data.split("train"), data.info))
    assert "class 'surprise': has no sample" in said
    assert "neutral" not in said
    with pytest.raises(UsageError, match=r"no sample in the split 'valid'; it has train \(6\)"):
        data.split("valid")


def test_speakers_stay_in_one_split(tmp_path: Path) -> None:
    file = feature_file(tmp_path / "a.npz")
    rows = [
        {"features": file, "text": "x", "label": "1", "speaker": f"s{i % 20}", "id": f"{i}"}
        for i in range(200)
    ]
    data = load_dataset(write_manifest(tmp_path, rows))
    owners = {
        split: {rows[int(sample.id)]["speaker"] for sample in samples}
        for split, samples in data.splits.items()
    }
    assert sum(map(len, owners.values())) == 20
    shares = [assign_split(f"key{i}") for i in range(3000)]
    assert 0.77 < shares.count("train") / 3000 < 0.83
