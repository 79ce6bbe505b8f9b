"""The transcript's pass beside the reading of the clip: given up, waited for, remembered."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make_fixtures import toy_gguf

from mse_runtime import ahead, cache
from mse_runtime.backbone import Backbone, passes
from mse_runtime.errors import BackboneError, StoppedError

pytest.importorskip("mse_kernels.tap")
IDS = np.arange(20, 220, dtype=np.int32)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    """Large enough for a pass of some tenths of a second, which is cut into several."""
    path = tmp_path_factory.mktemp("ahead") / "m.gguf"
    toy_gguf(path, "llama", n_embd=512, n_layer=8, n_head=8, n_ff=2048, dtype="f32")
    if passes._stop() is None:
        pytest.skip("the kernel library was not built")
    with Backbone.open(path, threads=2) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path))
    backbone.clear()


def bundle(size: int = 1 << 30) -> Any:
    gguf = SimpleNamespace(size=size, sha256="0" * 64)
    return SimpleNamespace(backbone=SimpleNamespace(gguf=gguf))


def later(seconds: float) -> Future[int]:
    future = Future[int]()
    threading.Timer(seconds, future.set_result, [0]).start()
    return future


def took(backbone: Backbone) -> float:
    begun = time.perf_counter()
    with backbone.aside():
        backbone.prefill(IDS, logits="none")
    backbone.clear()
    return time.perf_counter() - begun


def remember(backbone: Backbone, usual: Any) -> None:
    cache.remember(ahead.FILE, ahead._key(backbone, bundle(), len(IDS)), usual)


def remembered() -> list[float]:
    return list(cache.read_json(ahead.FILE).values())


def test_features_that_come_first_end_the_pass(backbone: Backbone) -> None:
    usual = min(took(backbone) for _ in range(3))
    remember(backbone, 1e4)
    for _ in range(50):  # on a busy machine they may come too late
        if not ahead.prefill(backbone, bundle(), IDS, later(usual / 10)):
            break
        remember(backbone, 1e4)
        backbone.clear()
    else:
        pytest.fail("no pass was given up")
    assert backbone.length(0) == 0
    assert remembered() == [1e4]
    done = Future[int]()
    done.set_exception(ValueError("a clip that cannot be read"))
    assert not ahead.prefill(backbone, bundle(), IDS, done)


def test_a_pass_that_ends_before_is_remembered(backbone: Backbone) -> None:
    never = Future[int]()
    assert ahead.prefill(backbone, bundle(), IDS, never)
    assert backbone.length(0) == len(IDS)
    (seconds,) = remembered()
    backbone.clear()
    expected = backbone.prefill(IDS)
    backbone.clear()
    assert ahead.prefill(backbone, bundle(), IDS[:-1], never)
    np.testing.assert_array_equal(backbone.prefill(IDS[-1:]), after_two(backbone, expected))
    never.set_result(0)  # too late for any pass
    backbone.clear()
    backbone.prefill(IDS)
    assert 0 < seconds < 60
    assert len(remembered()) == 1  # as many rows, nearly


def after_two(backbone: Backbone, expected: Any) -> Any:
    """What the last position gives after the others: rounding differs from that of one pass."""
    backbone.clear()
    backbone.prefill(IDS[:-1], logits="none")
    found = backbone.prefill(IDS[-1:])
    backbone.clear()
    backbone.prefill(IDS[:-1], logits="none")
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())
    return found


@pytest.mark.parametrize(
    ("usual", "whole"),
    [(1e4, False), (1e-6, True), ("x", True), (10**400, True), (math.inf, True), (-1, True)],
    ids=["long", "short", "text", "huge", "endless", "negative"],
)
def test_most_of_a_pass_is_worth_its_end(backbone: Backbone, usual: Any, whole: bool) -> None:
    """And so is the first one, of which nothing is known."""
    remember(backbone, usual)
    ready = Future[int]()
    ready.set_result(0)
    assert ahead.prefill(backbone, bundle(), IDS, ready) == whole
    assert backbone.length(0) == (len(IDS) if whole else 0)


def test_a_small_model_is_never_stopped(backbone: Backbone) -> None:
    ready = Future[int]()
    ready.set_result(0)
    assert ahead.prefill(backbone, bundle(1000), IDS, ready)
    assert remembered() == []


def test_what_was_set_aside_is_taken_back(backbone: Backbone) -> None:
    lib, context = backbone._lib, backbone._context
    with backbone.aside() as stop:
        assert lib.llama_n_threads(context) == 1
        stop()
        for _ in range(2):
            with pytest.raises(StoppedError):
                backbone.prefill(IDS)
        assert backbone.length(0) == 0
    assert lib.llama_n_threads(context) == 2
    stop()
    assert np.isfinite(backbone.prefill(IDS)).all()


def test_a_closed_backbone_refuses(tmp_path: Path) -> None:
    closed = Backbone.open(toy_gguf(tmp_path / "m.gguf", "llama"), threads=1)
    closed.close()
    with pytest.raises(BackboneError, match="closed"), closed.aside():
        pass


def test_without_the_kernels_nothing_stops_a_pass(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(backbone, 1e4)
    monkeypatch.setattr("mse_runtime.backbone.passes._stop", lambda: None)
    with backbone.aside() as stop:
        stop()
        assert backbone._lib.llama_n_threads(backbone._context) == 2
    ready = Future[int]()
    ready.set_result(0)
    assert ahead.prefill(backbone, bundle(), IDS, ready)
