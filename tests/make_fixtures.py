"""Toy GGUF models for the tests: `python tests/make_fixtures.py OUT` writes one of each kind.

Random weights and small, working vocabularies: they say nothing sensible, but llama.cpp runs
them exactly as it runs the real ones. `synthetic_gguf` writes the real shapes for benchmarks.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))

from toy_vocab import NORMAL, Vocab, bpe, chatglm, spm

Array = npt.NDArray[np.float32]
ARCHES = ("llama", "qwen", "qwen2", "chatglm")
_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions. `n_ff` is the width between the two halves of the FFN."""

    arch: str
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx: int = 2048

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_width(self) -> int:
        return self.head_dim * self.n_head_kv

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes (rows first) of every tensor, in file order."""
        d, kv, ff = self.n_embd, self.kv_width, self.n_ff
        yield "token_embd.weight", (self.n_vocab, d)
        for i in range(self.n_layer):
            yield f"blk.{i}.attn_norm.weight", (d,)
            if self.arch in ("qwen", "chatglm"):  # query, key and value in one matrix
                yield f"blk.{i}.attn_qkv.weight", (d + 2 * kv, d)
                yield f"blk.{i}.attn_qkv.bias", (d + 2 * kv,)
            else:
                for letter, rows in (("q", d), ("k", kv), ("v", kv)):
                    yield f"blk.{i}.attn_{letter}.weight", (rows, d)
                    if self.arch == "qwen2":
                        yield f"blk.{i}.attn_{letter}.bias", (rows,)
            yield f"blk.{i}.attn_output.weight", (d, d)
            yield f"blk.{i}.ffn_norm.weight", (d,)
            if self.arch == "chatglm":  # gate and up in one matrix
                yield f"blk.{i}.ffn_up.weight", (2 * ff, d)
            else:
                yield f"blk.{i}.ffn_gate.weight", (ff, d)
                yield f"blk.{i}.ffn_up.weight", (ff, d)
            yield f"blk.{i}.ffn_down.weight", (d, ff)
        yield "output_norm.weight", (d,)
        yield "output.weight", (self.n_vocab, d)


def _header(path: Path, shape: Shape, vocab: Vocab, name: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), shape.arch)
    writer.add_name(name)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    # Qwen v1 counts both halves of the gated FFN.
    writer.add_feed_forward_length(shape.n_ff * 2 if shape.arch == "qwen" else shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5 if shape.arch in ("llama", "chatglm") else 1e-6)
    # ChatGLM rotates only the first half of each head.
    writer.add_rope_dimension_count(shape.head_dim // (2 if shape.arch == "chatglm" else 1))
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores)
    if vocab.merges is not None:
        writer.add_token_merges(vocab.merges)
    for role, index in vocab.special.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", index)
    writer.add_add_bos_token(False)
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, value: Array, dtype: str) -> None:
    kind = _TYPES[dtype]
    if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:  # norms and biases stay f32
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    elif dtype == "f16":
        writer.add_tensor(name, value.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


def toy_gguf(
    path: Path,
    arch: str,
    *,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int | None = None,
    n_ff: int = 96,
    seed: int = 0,
    dtype: str = "f32",
    vocab: Vocab | None = None,
) -> Path:
    """Write a random model of `arch` (llama, qwen, qwen2, chatglm) with a working vocabulary.

    dtype: f32, f16, bf16, q8_0 or q4_0 (widths must be multiples of 32). Key/value heads default
    to 2 where the architecture shares them (qwen2, chatglm), else `n_head`. Returns `path`.
    """
    if arch not in ARCHES:
        raise ValueError(f"unknown architecture {arch!r}: one of {ARCHES}")
    if vocab is None:
        vocab = {"llama": spm, "chatglm": chatglm}.get(arch, bpe)()
    if n_head_kv is None:
        n_head_kv = 2 if arch in ("qwen2", "chatglm") else n_head
    shape = Shape(arch, n_embd, n_layer, n_head, n_head_kv, n_ff, len(vocab.tokens))
    rng = np.random.default_rng([seed, ARCHES.index(arch)])
    writer = _header(path, shape, vocab, f"toy {arch}")
    for name, size in shape.tensors():
        value = rng.standard_normal(size, dtype=np.float32)
        if "norm" in name:
            value = 1 + 0.1 * value
        elif len(size) == 1:
            value *= 0.1
        elif name != "token_embd.weight":
            value *= size[1] ** -0.5
        _add(writer, name, value.astype(np.float32), dtype)
    _finish(writer)
    return path


def stories_gguf(path: Path, weights: Path, tokenizer: Path, dtype: str = "f32") -> Path:
    """Convert llama2.c's `stories*.bin` and `tok*.bin` (see its `export.py`) to GGUF."""
    raw = weights.read_bytes()
    d, ff, n_layer, n_head, n_kv, n_vocab, n_ctx = struct.unpack_from("<7i", raw)
    tied, n_vocab = n_vocab > 0, abs(n_vocab)
    shape = Shape("llama", d, n_layer, n_head, n_kv, ff, n_vocab, n_ctx)
    flat = np.frombuffer(raw, "<f4", offset=28)
    at = 0

    def take(*size: int) -> Array:
        nonlocal at
        count = int(np.prod(size))
        at += count
        return flat[at - count : at].reshape(size)

    kv = shape.kv_width
    embedding = take(n_vocab, d)
    layers = {
        "attn_norm": take(n_layer, d), "attn_q": take(n_layer, d, d),
        "attn_k": take(n_layer, kv, d), "attn_v": take(n_layer, kv, d),
        "attn_output": take(n_layer, d, d), "ffn_norm": take(n_layer, d),
        "ffn_gate": take(n_layer, ff, d), "ffn_down": take(n_layer, d, ff),
        "ffn_up": take(n_layer, ff, d),
    }  # fmt: skip
    final_norm = take(d)
    take(n_ctx, shape.head_dim)  # the two RoPE tables, which llama.cpp computes itself
    output = embedding if tied else take(n_vocab, d)
    writer = _header(path, shape, _llama2c_vocab(tokenizer, n_vocab), "stories")
    _add(writer, "token_embd.weight", embedding, dtype)
    for i in range(n_layer):
        for part, values in layers.items():
            _add(writer, f"blk.{i}.{part}.weight", values[i], dtype)
    _add(writer, "output_norm.weight", final_norm, dtype)
    _add(writer, "output.weight", output, dtype)
    _finish(writer)
    return path


def _llama2c_vocab(path: Path, n_vocab: int) -> Vocab:
    vocab = spm()  # for the types of the first 259 tokens
    raw, at = path.read_bytes(), 4
    tokens, scores = [], []
    for _ in range(n_vocab):
        score, size = struct.unpack_from("<fi", raw, at)
        tokens.append(raw[at + 8 : at + 8 + size].decode("utf-8").replace(" ", "▁"))
        scores.append(score)
        at += 8 + size
    tokens[:3] = vocab.tokens[:3]
    tokens[3:259] = vocab.tokens[3:259]
    types = vocab.types[:259] + [NORMAL] * (n_vocab - 259)
    return Vocab("llama", "default", tokens, types, scores, special=vocab.special)


SHAPES = {
    "mid": Shape("llama", 2048, 24, 16, 16, 5632, 32000),
    "llama2-7b": Shape("llama", 4096, 32, 32, 32, 11008, 32000),
    "qwen-1.8b": Shape("qwen", 2048, 24, 16, 16, 5504, 151936),
    "chatglm3-6b": Shape("chatglm", 4096, 28, 32, 2, 13696, 65024),
}


def synthetic_gguf(
    path: Path, shape: Shape, *, embedding: str = "f16", seed: int = 0, sparse: bool = False
) -> Path:
    """Write `shape` with random Q4_0 weights, tensor by tensor: for speed and memory only.

    Blocks get one common scale and random nibbles, so writing is as fast as the disk. `sparse`
    leaves a hole instead of the weights: enough for plans.
    """
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(shape.n_vocab - 259)]
    base = spm()
    vocab = Vocab(
        "llama", "default", base.tokens[:259] + words, base.types[:259] + [NORMAL] * len(words),
        [0.0] * shape.n_vocab, special=base.special,
    )  # fmt: skip
    writer = _header(path, shape, vocab, "synthetic")
    plan, total = [], 0
    for name, size in shape.tensors():
        kind = "f32" if len(size) == 1 else embedding if name == "token_embd.weight" else "q4_0"
        per_block, block = gguf.GGML_QUANT_SIZES[_TYPES[kind]]
        n_bytes = int(np.prod(size)) // per_block * block
        writer.add_tensor_info(name, size, np.dtype(np.float32), n_bytes, _TYPES[kind])
        plan.append((name, size, kind))
        total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if sparse:
        writer.close()
        os.truncate(path, path.stat().st_size + total + len(plan) * 32)
        return path
    for name, size, kind in plan:
        writer.write_tensor_data(_random_tensor(rng, name, size, kind))
    writer.close()
    return path


def _random_tensor(
    rng: np.random.Generator, name: str, size: tuple[int, ...], kind: str
) -> npt.NDArray[np.uint8]:
    if kind == "f32":
        value = np.full(size, 1.0 if "norm" in name else 0.0, np.float32)
        return value.view(np.uint8)
    if kind == "f16":
        return rng.standard_normal(size, np.float32).astype(np.float16).view(np.uint8)
    blocks = int(np.prod(size)) // 32
    data = np.frombuffer(rng.bytes(blocks * 18), np.uint8).reshape(blocks, 18).copy()
    scale = np.float16(size[1] ** -0.5 / 4.6)  # uniform nibbles have a spread of 4.6
    data[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("--synthetic", choices=sorted(SHAPES), help="one real shape instead")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.synthetic:
        print(synthetic_gguf(args.out / f"{args.synthetic}.gguf", SHAPES[args.synthetic]))
        return
    for arch in ARCHES:
        print(toy_gguf(args.out / f"toy-{arch}.gguf", arch))


if __name__ == "__main__":
    main()
