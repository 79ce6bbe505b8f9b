"""What is imported when: in fresh interpreters, because a test run has everything loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEVER = ("torch", "transformers", "optimum", "onnx", "mse_export", "tensorflow", "pandas")
LATE = ("numpy", "av", "PIL", "onnxruntime", "llama_cpp", "click", "rich", "huggingface_hub")


def modules_after(code: str) -> set[str]:
    """Top-level modules in `sys.modules` after `code` ran in a new interpreter."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_loads_nothing_heavy() -> None:
    loaded = modules_after("import mse_runtime")
    assert not loaded & {*NEVER, *LATE}


def test_every_public_name_is_there() -> None:
    import mse_runtime

    for name in mse_runtime.__all__:
        assert getattr(mse_runtime, name) is not None
    with pytest.raises(AttributeError):
        _ = mse_runtime.nothing


def test_a_whole_run_stays_free_of_training_packages() -> None:
    clip = ROOT / "examples" / "happy.mp4"
    code = (
        "import sys, contextlib, io\n"
        # --low-memory: the clip is read in the same process
        f"sys.argv = ['mse-run', {str(clip)!r}, 'I love it', '--json', '--low-memory']\n"
        "from mse_runtime.cli import run\n"
        "with contextlib.redirect_stdout(io.StringIO()): run(standalone_mode=False)"
    )
    loaded = modules_after(code)
    assert "llama_cpp" in loaded
    assert "onnxruntime" in loaded
    assert not loaded & set(NEVER)
