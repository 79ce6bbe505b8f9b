"""Fixtures of the backbone tests: a toy model of each architecture, opened and closed again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backbone_cases import Open
from make_fixtures import ARCHES, toy_gguf

from mse_runtime.backbone import Backbone


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toys")
    return {arch: toy_gguf(folder / f"{arch}.gguf", arch) for arch in ARCHES}


@pytest.fixture
def open_toy(toys: dict[str, Path]) -> Iterator[Open]:
    opened: list[Backbone] = []

    def start(arch: str = "llama", **options: Any) -> Backbone:
        defaults: dict[str, Any] = {"kv_type": "f32", "threads": 1, "n_seq_max": 3, "n_ctx": 256}
        opened.append(Backbone.open(toys[arch], **(defaults | options)))
        return opened[-1]

    yield start
    for backbone in opened:
        backbone.close()
