"""docs/backbone.md: its example runs, and its table names what exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from make_fixtures import toy_gguf

from mse_runtime.backbone import Backbone

PAGE = Path(__file__).resolve().parent.parent / "docs" / "backbone.md"


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    toy_gguf(tmp_path / "model.gguf", "llama")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    assert "(5, 514)" in capsys.readouterr().out


def test_the_table_names_what_exists() -> None:
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    named = set(re.findall(r"`(?:Backbone\.)?(\w+)\(", " ".join(table)))
    public = {
        name
        for name, _ in inspect.getmembers(Backbone, callable)
        if not name.startswith("_") and name != "close"
    }
    assert named == public
    options = re.search(r"open\(path, \*, ([^)]*)\)", " ".join(table))
    assert options is not None
    parameters = list(inspect.signature(Backbone.open).parameters)
    assert ["path", *options[1].split(", ")] == parameters
