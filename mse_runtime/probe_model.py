"""A GGUF of 1.5 MB that takes every fast matrix kernel llama.cpp has for quantised weights.

One layer each in Q4_0, Q8_0, Q4_K and Q6_K and an output in F16, 256 wide: wide enough for a
K-quant's block, for repacking (8 rows) and for AMX tiles (32 rows and columns). Random weights,
no vocabulary.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mse_runtime.quants import BLOCKS, TYPE_NAMES

__all__ = ["N_VOCAB", "write_probe_model"]

WIDTH, N_VOCAB = 256, 64
LAYERS = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
# Where a block's float16 scales lie; everything else in it may be any byte.
_SCALES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
_SIZE = {"Q4_0": 0.013, "Q8_0": 0.0008, "Q4_K": 0.0004, "Q6_K": 0.00005}
_ALIGN = 32
_IDS = {name: kind for kind, name in TYPE_NAMES.items()}


def write_probe_model(path: Path) -> Path:
    """Write the model, always the same bytes; returns `path`."""
    rng = np.random.default_rng(0)
    tensors: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (N_VOCAB, WIDTH), "F32")
    ]
    for i, kind in enumerate(LAYERS):
        tensors += [
            (f"blk.{i}.{norm}.weight", (WIDTH,), "F32") for norm in ("attn_norm", "ffn_norm")
        ]
        tensors += [
            (f"blk.{i}.{part}.weight", (WIDTH, WIDTH), kind)
            for part in (
                "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
            )
        ]  # fmt: skip
    tensors += [
        ("output_norm.weight", (WIDTH,), "F32"),
        ("output.weight", (N_VOCAB, WIDTH), "F16"),
    ]
    entries = _metadata()
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries)
    data = b""
    for name, shape, kind in tensors:
        header += _text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}QIQ", *shape[::-1], _IDS[kind], len(data))
        raw = _values(rng, shape, kind)
        data += raw + bytes(-len(raw) % _ALIGN)
    path.write_bytes(header + bytes(-len(header) % _ALIGN) + data)
    return path


def _values(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> bytes:
    if kind == "F32":
        ones = np.ones(shape, np.float32)
        return (ones if len(shape) == 1 else rng.standard_normal(shape, np.float32)).tobytes()
    if kind == "F16":
        return (0.06 * rng.standard_normal(shape, np.float32)).astype(np.float16).tobytes()
    per_block, size = BLOCKS[kind]
    blocks: npt.NDArray[np.uint8] = rng.integers(
        0, 256, (int(np.prod(shape)) // per_block, size), dtype=np.uint8
    )
    scale = np.frombuffer(np.float16(_SIZE[kind]).tobytes(), np.uint8)
    for at in _SCALES[kind]:
        blocks[:, at : at + 2] = scale
    return blocks.tobytes()


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _metadata() -> list[bytes]:
    strings = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    numbers = {
        "context_length": 256, "embedding_length": WIDTH, "block_count": len(LAYERS),
        "feed_forward_length": WIDTH, "attention.head_count": 4, "vocab_size": N_VOCAB,
    }  # fmt: skip
    entries = [_text(key) + struct.pack("<I", 8) + _text(value) for key, value in strings.items()]
    entries += [
        _text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()
    ]
    epsilon = _text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)
    return [*entries, epsilon]
