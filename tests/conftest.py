"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

from mse_runtime.backbone import library
from mse_runtime.errors import BackboneError

# Machines that run tests are shared and noisy: no example has a deadline.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")

# Before a test module imports the whole of llama_cpp: the runtime loads it so that the product of
# Q4_0 weights of mse_kernels stands in for its own.
with suppress(BackboneError):
    library.load()

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path | None:
    """The folder of reference material, or None where there is none."""
    folder = Path(os.environ.get("MSE_TEST_DATA", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """`test_data("golden/adapter")` is that path, or the test is skipped by the path's name."""
    folder = data_folder()

    def get(name: str) -> Path:
        if folder is None or not (folder / name).exists():
            pytest.skip(f"no test data {name} (set MSE_TEST_DATA)")
        return folder / name

    return get


@pytest.fixture(autouse=True)
def isolated_user_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test reads or writes the user's own cache or configuration."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("MSE_CACHE", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
