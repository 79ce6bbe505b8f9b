"""ONNX sessions of the package's own graphs, optimised once and kept."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from mse_runtime.errors import BundleError
from mse_runtime.features import sessions
from mse_runtime.features.mesh import MODEL_FOLDER
from mse_runtime.features.sessions import Session

GRAPHS = sorted(MODEL_FOLDER.glob("*.onnx"))


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / sessions.FOLDER


def answers(session: Session) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [[n if isinstance(n, int) else 2 for n in shape] for shape in session.input_shapes]
    return session(*(rng.random(shape, np.float32) for shape in shapes))


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda path: path.stem)
def test_a_kept_graph_gives_the_same_numbers(graph: Path, folder: Path) -> None:
    plain = Session(graph)
    assert not folder.exists()
    for _ in range(2):
        kept = Session(graph, threads=2, keep=True)
        (place,) = folder.iterdir()
        assert (kept.inputs, kept.outputs) == (plain.inputs, plain.outputs)
        assert kept.input_shapes == plain.input_shapes
        for found, expected in zip(answers(kept), answers(plain), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert place.suffix == ".onnx"


def test_the_kept_graph_is_what_is_loaded(folder: Path) -> None:
    for graph in GRAPHS[:2]:
        Session(graph, keep=True)
    one, other = sorted(folder.iterdir(), key=lambda place: place.stat().st_mtime)
    first, second = (Session(graph).input_shapes for graph in GRAPHS[:2])
    assert first != second
    good = one.read_bytes()
    shutil.copy(other, one)  # as it is, that is damage
    assert Session(GRAPHS[0], keep=True).input_shapes == first
    assert one.read_bytes() == good
    graph = sessions._read(other)
    one.write_bytes(sessions._sum(one, graph) + graph)
    assert Session(GRAPHS[0], keep=True).input_shapes == second


def test_a_damaged_graph_is_made_anew(folder: Path) -> None:
    """A page of zeros among the weights, say, with which it would still load."""
    whole = answers(Session(GRAPHS[0], keep=True))
    (place,) = folder.iterdir()
    good = place.read_bytes()
    middle = len(good) // 2
    zeroed = good[:middle] + bytes(4096) + good[middle + 4096 :]
    for damaged in (
        b"",
        b"no",
        b"no graph",
        good[:-1000],
        zeroed,
        sessions._sum(place, b"no graph") + b"no graph",
    ):
        place.write_bytes(damaged)
        for found, expected in zip(answers(Session(GRAPHS[0], keep=True)), whole, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert [*folder.iterdir()] == [place]
        assert sessions._read(place)


def test_a_graph_that_changed_is_optimised_anew(folder: Path, tmp_path: Path) -> None:
    graph = tmp_path / "graph.onnx"
    for model in GRAPHS[:2]:
        shutil.copy(model, graph)
        assert Session(graph, keep=True).input_shapes == Session(model).input_shapes
    assert len([*folder.iterdir()]) == 2
    graph.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="not an ONNX graph"):
        Session(graph, keep=True)
    assert len([*folder.iterdir()]) == 2


def test_the_oldest_go(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "KEEP", 2)
    for name in "abc":
        shutil.copy(GRAPHS[0], tmp_path / f"{name}.onnx")
        Session(tmp_path / f"{name}.onnx", keep=True)
    assert len([*folder.iterdir()]) == 2


def test_without_a_folder_the_graph_itself_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    assert Session(GRAPHS[0], keep=True).inputs
    folder.unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryDirectory", full)
        assert Session(GRAPHS[0], keep=True).inputs
    for method in ("read_bytes", "mkdir"):  # a folder of somebody else's
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, full)
            assert Session(GRAPHS[0], keep=True).inputs
    assert not [*folder.iterdir()]


def test_what_an_ended_process_left_goes_in_time(folder: Path) -> None:
    for name, age in (("part-old", 7200), ("part-new", 60)):
        (folder / name).mkdir(parents=True)
        (folder / name / "graph.onnx").touch()
        os.utime(folder / name, (time.time() - age, time.time() - age))
    Session(GRAPHS[0], keep=True)
    assert {place.name for place in folder.iterdir() if place.is_dir()} == {"part-new"}
