"""Fixtures of the training tests, for `pytest_plugins`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def one_thread() -> None:
    """PyTorch on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model, as a Hugging Face folder."""
    from training_cases import llama_folder

    return llama_folder(tmp_path_factory.mktemp("hf") / "llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set with emotions."""
    from training_cases import emotional_data

    return emotional_data(tmp_path_factory.mktemp("data") / "emotions")
