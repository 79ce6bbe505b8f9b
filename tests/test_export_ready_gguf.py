"""Ready GGUF files: the user's own, of architectures without a converter, and the built-in one."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
pytest.importorskip("onnx")

from gguf.constants import GGMLQuantizationType as T

from mse_export.cli import command
from mse_export.gguf_write import GgufTensor, gguf_header, write_gguf
from mse_export.vocab import synthetic
from mse_runtime import Analyzer
from mse_runtime.bundle import load_bundle
from mse_runtime.errors import BackboneError
from mse_runtime.features.spec import Features

WIDTH, INNER, HEADS, VOCABULARY = 64, 128, 4, 2000


def ready_gguf(path: Path, arch: str, block: dict[str, tuple[int, ...]]) -> Path:
    """Two layers with random F16 weights; `block`: what a layer has beside attention and FFN."""
    layer = {
        "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH),
        "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER), **block,
    }  # fmt: skip
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    if arch != "gemma3":
        shapes["output.weight"] = (VOCABULARY, WIDTH)
    table = [GgufTensor(n, s, T.F32 if len(s) == 1 else T.F16) for n, s in shapes.items()]
    numbers: dict[str, Any] = {
        "block_count": 2, "context_length": 2048, "embedding_length": WIDTH,
        "feed_forward_length": INNER, "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS, "attention.key_length": WIDTH // HEADS,
        "attention.value_length": WIDTH // HEADS, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 512,
    }  # fmt: skip
    metadata = {f"{arch}.{key}": value for key, value in numbers.items()}
    metadata |= {"general.file_type": 1, **synthetic.sentencepiece(VOCABULARY).metadata()}
    rng = np.random.default_rng(0)

    def data(i: int) -> list[Any]:
        shape = table[i].shape
        if len(shape) == 1:
            return [np.ones(shape, np.float32)]
        return [(rng.standard_normal(shape) * shape[1] ** -0.5).astype(np.float16)]

    write_gguf(path, gguf_header(arch, metadata, table), table, data)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.mark.parametrize("target", ["auto", "q8_0"])
def test_an_architecture_without_a_converter(target: str, tmp_path: Path) -> None:
    norms = {"attn_q_norm": (WIDTH // HEADS,), "attn_k_norm": (WIDTH // HEADS,)}
    source, out = ready_gguf(tmp_path / "m.gguf", "qwen3", norms), tmp_path / "out"
    result = run("--backbone", source, "--init", "random", "--quant", target, "-o", out)
    assert result.exit_code == 0, result.exception
    bundle = load_bundle(out)
    assert bundle.backbone.arch == "qwen3"
    assert bundle.backbone.gguf.type == ("F16" if target == "auto" else "Q8_0")
    checks = {check["name"]: check["result"] for check in bundle.parity["checks"]}
    assert checks["adapter: torch against onnx"] == "ok"
    assert (checks["tokeniser"], checks["first-step logits"]) == ("skipped", "skipped")
    with Analyzer.open(out, threads=1, adapter="onnx") as analyzer:
        answer = analyzer.analyze_features(Features(None, None, 0.0), "I love it.")
    assert answer.bundle["trained"] is False


def test_one_that_cannot_take_rows_is_refused(tmp_path: Path) -> None:
    """Gemma 3 scales the embeddings of tokens but not rows: answers would be wrong, silently."""
    norms = dict.fromkeys(("attn_q_norm", "attn_k_norm"), (WIDTH // HEADS,))
    norms |= dict.fromkeys(("post_attention_norm", "post_ffw_norm"), (WIDTH,))
    source = ready_gguf(tmp_path / "m.gguf", "gemma3", norms)
    result = run("--backbone", source, "--init", "random", "-o", tmp_path / "out")
    assert isinstance(result.exception, BackboneError)
    assert "differently from its tokens" in str(result.exception)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize(
    ("options", "layout"),
    [((), "pseudo-last"), (("--dataset", "mosei", "--layout", "published"), "published")],
)
def test_the_built_in_model_by_its_name(
    options: tuple[str, ...], layout: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("--backbone", "tiny", "--init", "random", *options, "--offline", "-o", out)
    assert result.exit_code == 0, result.exception
    assert load_bundle(out).layout == layout


def test_the_bar_shows_bytes_and_time_left(tmp_path: Path) -> None:
    """On a terminal; elsewhere stages are plain lines."""
    norms = {"attn_q_norm": (WIDTH // HEADS,), "attn_k_norm": (WIDTH // HEADS,)}
    source = ready_gguf(tmp_path / "m.gguf", "qwen3", norms)
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mse_export.cli", "--backbone", str(source), "--init", "random",
            "--quant", "q8_0", "--no-verify", "-o", str(tmp_path / "out"),
        ],
        stderr=child, stdout=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120",
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    os.close(child)
    seen = b""
    with suppress(OSError):  # the other end is closed
        while select.select([parent], [], [], 100)[0]:
            seen += os.read(parent, 65536)
    os.close(parent)
    assert process.wait(60) == 0, seen
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode("utf-8"))
    assert re.search(r"[\d.]+/[\d.]+ [kM]B", shown), shown
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown), shown
