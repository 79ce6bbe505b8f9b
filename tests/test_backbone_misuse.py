"""Misuse of the backbone: an error instead of a dead process, and the cache as it was."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backbone_cases import TOLERANCE, Open, worst

from mse_runtime.backbone import Backbone, library
from mse_runtime.errors import BackboneError

pytest_plugins = ("backbone_fixtures",)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "at least one"),
        ([-1], "0 .. 513"),
        ([514], "0 .. 513"),
        ([1 << 40], "0 .. 513"),
        ([0.5], "whole-number ids"),
        ([True, False], "whole-number ids"),
        (["a"], "whole-number ids"),
        ([[1, 2], [3]], "A batch must be"),
        (np.zeros((2, 63), np.float32), "floats \\[n, 64\\]"),
        (np.zeros((2, 64), np.int32), "floats \\[n, 64\\]"),
        (np.zeros((0, 64), np.float32), "at least one"),
        (np.zeros((1, 2, 64), np.float32), "floats \\[n, 64\\]"),
        (np.full((2, 64), np.nan, np.float32), "row 0 holds NaN"),
        (np.array([[0.0] * 64, [1e300] * 64]), "row 1 holds NaN or infinity"),
        (np.arange(257), "do not fit"),
    ],
)
def test_refused_batches(open_toy: Open, inputs: Any, message: str) -> None:
    backbone = open_toy()
    backbone.prefill([1, 2, 3], logits="none")
    for attempt in (
        lambda: backbone.prefill(inputs),
        lambda: backbone.prefill_many([(1, [4]), (0, inputs)]),
    ):
        with pytest.raises(BackboneError, match=message):
            attempt()
    assert [backbone.length(seq) for seq in range(3)] == [3, 0, 0]
    assert worst(backbone.prefill([4]), open_toy().prefill([1, 2, 3, 4])) <= TOLERANCE


def test_a_full_cache(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill(np.arange(200), seq=0, logits="none")
    with pytest.raises(BackboneError, match="no room for 100 more"):
        backbone.prefill(np.arange(100), seq=1)
    assert [backbone.length(seq) for seq in range(2)] == [200, 0]
    with pytest.raises(BackboneError, match="do not fit"):
        backbone.prefill_tree([1], np.arange(56), np.arange(56) - 1)
    backbone.prefill(np.arange(50), seq=1, logits="none")
    with pytest.raises(BackboneError, match="no room"):
        backbone.prefill_tree([1], np.arange(6), [-1] * 6)
    assert [backbone.length(seq) for seq in range(2)] == [200, 50]
    backbone.prefill(np.arange(6), seq=1)


def test_a_tree_whose_later_pass_finds_no_room(open_toy: Open) -> None:
    """The first pass has put the inputs into the cache by then: they go again."""
    backbone = open_toy(tree_width=2)
    backbone.prefill(np.arange(200), logits="none")
    chain = [-1, *range(2, 16)]
    parents = [-1, -1, *chain, -1, *range(17, 31)]  # two short leaves, then two of 15 nodes
    with pytest.raises(BackboneError, match="no room for 30 more"):
        backbone.prefill_tree(np.arange(40), np.arange(32), parents)
    assert backbone.length() == 200


@pytest.mark.parametrize("seq", [-1, 3, 1.0, "0", True, 1 << 40])
def test_sequences_that_do_not_exist(open_toy: Open, seq: Any) -> None:
    backbone = open_toy()
    saved = backbone.save_state(0)
    for attempt in (
        lambda: backbone.prefill([1], seq=seq),
        lambda: backbone.prefill_many([(seq, [1])]),
        lambda: backbone.prefill_tree([1], [1], [-1], seq=seq),
        lambda: backbone.length(seq),
        lambda: backbone.clear(seq),
        lambda: backbone.copy(0, seq),
        lambda: backbone.truncate(seq, 0),
        lambda: backbone.save_state(seq),
        lambda: backbone.load_state(seq, saved),
    ):
        with pytest.raises(BackboneError, match="sequence"):
            attempt()


def test_other_arguments_that_make_no_sense(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill([1, 2], logits="none")
    for attempt, message in (
        (lambda: backbone.prefill([1], logits="first"), "logits must be"),  # type: ignore[call-overload]
        (lambda: backbone.prefill_many([]), "no sequence"),
        (lambda: backbone.prefill_many([(0, [1]), (0, [2])]), "occurs twice"),
        (lambda: backbone.prefill_tree([3], [1, 2], [-1]), "tree of 2 tokens"),
        (lambda: backbone.prefill_tree([3], [1], [-1], [True, False]), "and 2"),
        (lambda: backbone.prefill_tree([3], [1, 2], [1, -1]), "parents before children"),
        (lambda: backbone.prefill_tree([3], [1], [-2]), "parents before children"),
        (lambda: backbone.prefill_tree([], [1], [-1]), "at least one"),
        (lambda: backbone.prefill_tree([3], [999999], [-1]), "0 .. 513"),
        (lambda: backbone.truncate(0, 3), "cannot be cut"),
        (lambda: backbone.truncate(0, -1), "cannot be cut"),
        (lambda: backbone.detokenize([-5]), "0 .. 513"),
        (lambda: backbone.embed([514]), "0 .. 513"),
    ):
        with pytest.raises(BackboneError, match=message):
            attempt()
    assert backbone.length() == 2
    with pytest.raises(BackboneError, match="tree_width=0"):
        open_toy(tree_width=0).prefill_tree([3], [1], [-1])


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": 0}, {"n_ctx": -5}, {"n_ctx": 1 << 30}, {"n_seq_max": 0}, {"n_seq_max": 257},
     {"threads": 0}, {"threads": 1 << 20}, {"kv_type": "q3"}, {"n_outputs_max": 0},
     {"tree_width": 400}, {"n_gpu_layers": -2}, {"n_ctx": 1.5}],
)  # fmt: skip
def test_options_that_make_no_sense(open_toy: Open, options: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match=next(iter(options))):
        open_toy(**options)


def test_damaged_and_foreign_states(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill(np.arange(20), logits="none")
    saved = backbone.save_state(0)
    flipped = bytearray(saved)
    flipped[200] ^= 1
    for bad in (b"", b"x" * 100, saved[:-1], saved + b"x", bytes(flipped), "text"):
        with pytest.raises(BackboneError, match="state"):
            backbone.load_state(1, bad)  # type: ignore[arg-type]
    for other in (open_toy("chatglm"), open_toy(kv_type="f16"), open_toy(flash_attention=True)):
        with pytest.raises(BackboneError, match="another model"):
            other.load_state(0, saved)
    backbone.prefill(np.arange(200), seq=1, logits="none")
    backbone.clear(0)
    backbone.prefill(np.arange(50), seq=2, logits="none")
    with pytest.raises(BackboneError, match="no room"):
        backbone.load_state(0, saved)
    assert [backbone.length(seq) for seq in range(3)] == [0, 200, 50]


def test_use_after_close(open_toy: Open) -> None:
    backbone = open_toy()
    saved = backbone.save_state(0)
    backbone.close()
    backbone.close()
    for attempt in (
        lambda: backbone.prefill([1]),
        lambda: backbone.prefill_many([(0, [1])]),
        lambda: backbone.prefill_tree([1], [1], [-1]),
        lambda: backbone.tokenize("a"),
        lambda: backbone.detokenize([5]),
        lambda: backbone.embed([1]),
        backbone.length,
        backbone.clear,
        lambda: backbone.copy(0, 1),
        lambda: backbone.truncate(0, 0),
        backbone.save_state,
        lambda: backbone.load_state(0, saved),
        lambda: backbone.reserve(1000),
    ):
        with pytest.raises(BackboneError, match="closed"):
            attempt()


def test_models_that_cannot_be_loaded(tmp_path: Path, toys: dict[str, Path]) -> None:
    whole = toys["llama"].read_bytes()
    foreign = whole.replace(b"llama", b"gguff")  # an architecture nobody has heard of
    missing = whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_op")
    for name, data, message in (
        ("unknown", foreign, "cannot load"),
        ("missing", missing, "cannot load.*ffn_up"),
        ("cut", whole[:-1000], "damaged or cut short"),
        ("text", b"once upon a time", "not a GGUF file"),
        ("empty", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BackboneError, match=message):
            Backbone.open(tmp_path / name, threads=1)
    with pytest.raises(BackboneError, match="does not exist"):
        Backbone.open(tmp_path / "nothing.gguf")


def test_progress_is_told_and_may_stop_the_load(toys: dict[str, Path]) -> None:
    seen: list[float] = []
    Backbone.open(toys["llama"], threads=1, progress=seen.append).close()
    assert seen[-1] == 1.0
    assert seen == sorted(seen)

    def stop(_fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Backbone.open(toys["llama"], threads=1, progress=stop)


def test_what_is_told_about_the_run(open_toy: Open) -> None:
    backbone = open_toy("chatglm")
    assert (backbone.arch, backbone.n_embd, backbone.n_layer, backbone.n_ctx) == (
        "chatglm", 64, 2, 256,
    )  # fmt: skip
    info = backbone.info
    assert info["device"] == "cpu"
    assert info["threads"] == 1
    assert any("KV" in name for name in info["buffers_mib"])


def test_importing_is_light_and_llama_cpp_stays_whole(toys: dict[str, Path]) -> None:
    """Opening leaves llama.cpp's log off stderr; the real package can still be imported."""
    code = (
        "import sys\n"
        "from mse_runtime.backbone import Backbone\n"
        "assert 'llama_cpp' not in sys.modules and 'gguf' not in sys.modules\n"
        f"backbone = Backbone.open({str(toys['llama'])!r}, threads=1)\n"
        "assert 'jinja2' not in sys.modules and 'gguf' not in sys.modules\n"
        "import llama_cpp\n"
        "assert llama_cpp.Llama and llama_cpp.llama_cpp is sys.modules['llama_cpp.llama_cpp']\n"
        "backbone.prefill([1, 2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def _patched(data: bytes, key: bytes, value: bytes) -> bytes:
    at = data.index(key) + len(key) + 4  # the value's type comes first
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embedding_length", struct.pack("<I", 32), "embedding table is 64 wide"),
        ("block_count", struct.pack("<I", 0), "0 layers"),
        ("block_count", struct.pack("<I", 1 << 20), "1048576 layers"),
        ("attention.head_count", struct.pack("<I", 0), "0 query heads"),
        ("attention.head_count_kv", struct.pack("<I", 3), "cannot share 3"),
        ("attention.head_count_kv", struct.pack("<I", 1610612740), "cannot share"),
        ("rope.dimension_count", struct.pack("<I", 8), "8 of 16 dimensions"),
        ("rope.dimension_count", struct.pack("<I", 0), "0 of 16 dimensions"),
        ("attention.layer_norm_rms_epsilon", struct.pack("<f", float("nan")), "epsilon is nan"),
    ],
)
def test_headers_that_would_kill_llama_cpp(
    tmp_path: Path, toys: dict[str, Path], key: str, value: bytes, message: str
) -> None:
    data = _patched(toys["llama"].read_bytes(), f"llama.{key}".encode(), value)
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(BackboneError, match=message):
        Backbone.open(tmp_path / "bad.gguf", threads=1)


def test_a_vocabulary_with_a_token_twice(tmp_path: Path, toys: dict[str, Path]) -> None:
    for twin in (b"<0x0B>", b"<0x0A\0"):  # the second is a twin to C strings alone
        data = toys["llama"].read_bytes().replace(b"<0x0C>", twin)
        data = data.replace(b"<0x0D>", b"<0x0A\0") if b"\0" in twin else data
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(BackboneError, match="a token twice"):
            Backbone.open(tmp_path / "bad.gguf", threads=1)


@pytest.mark.parametrize("own", [None, "77"])
def test_waiting_threads_go_to_sleep_soon(own: str | None) -> None:
    """GCC's OpenMP, if llama.cpp is built with it, sees the setting; later children do not."""
    code = (
        "import os\nfrom mse_runtime.backbone import library\nlibrary.load()\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    environment |= {} if own is None else {"GOMP_SPINCOUNT": own}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == str(own)
    if "GOMP_" not in done.stderr:
        pytest.skip("llama.cpp is built without GCC's OpenMP")
    assert f"GOMP_SPINCOUNT = '{own or library._SPINS}'" in done.stderr
