"""ggml's storage types: sizes, and rows back to float32.

The common types are decoded here in a few lines of numpy each; the others go to the `gguf`
package, whose import alone costs about 0.1 s. Each decoder gives llama.cpp's values bit for bit:
same operations, same order, in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mse_runtime.errors import BackboneError

__all__ = ["BLOCKS", "TYPE_NAMES", "dequantize"]

TYPE_NAMES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q8_1": (32, 40), "IQ4_NL": (32, 18), "MXFP4": (32, 17),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "Q8_K": (256, 292), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98), "IQ1_S": (256, 50), "IQ3_S": (256, 110), "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136), "IQ1_M": (256, 56), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip
"""Type name -> (elements of a block, bytes of a block)."""

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def dequantize(raw: Bytes, kind: str) -> Floats:
    """Rows of bytes [n, row bytes] of the ggml type `kind` as float32 [n, row elements].

    Raises BackboneError for types that neither this file nor the `gguf` package can decode.
    """
    raw = np.ascontiguousarray(raw)
    if kind == "F32":
        return raw.view(np.float32).copy()
    if kind == "F16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "Q8_0":
        scale, quants = _blocks(raw, 34)
        return (quants.view(np.int8).astype(np.float32) * scale).reshape(len(raw), -1)
    if kind == "Q4_0":
        scale, quants = _blocks(raw, 18)
        both = np.concatenate([quants & 15, quants >> 4], axis=1)  # low nibbles come first
        return ((both.astype(np.float32) - 8) * scale).reshape(len(raw), -1)
    if kind == "Q6_K":
        return _q6_k(raw)
    return _by_package(raw, kind)


def _blocks(raw: Bytes, size: int) -> tuple[Floats, Bytes]:
    """A leading float16 scale [blocks, 1] and the rest of each block."""
    blocks = raw.reshape(-1, size)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return scale, np.ascontiguousarray(blocks[:, 2:])


def _q6_k(raw: Bytes) -> Floats:
    """256 values: 4 low bits of each, 2 high bits of each, 16 scales of one byte, a float16."""
    blocks = raw.reshape(-1, 210)
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    both = (low & 15).reshape(-1, 2, 4, 32) | ((high & 3) << 4)
    scale = np.ascontiguousarray(blocks[:, 208:]).view(np.float16).astype(np.float32)
    scales = scale * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values = (both.astype(np.float32) - 32).reshape(-1, 16, 16) * scales[:, :, None]
    return values.reshape(len(raw), -1)


def _by_package(raw: Bytes, kind: str) -> Floats:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as by_package

    try:
        found: Floats = by_package(raw, GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError) as error:
        raise BackboneError(
            f"Weights of the type {kind} cannot be decoded here. Re-quantise the model with "
            "token embeddings as F16 or Q8_0 (`mse-export quantize --help`)."
        ) from error
    return found.astype(np.float32, copy=False)
