"""The frozen language model as a GGUF: LLaMA tensors, sentencepiece vocabulary, 16-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mse_export.training.tiny.model import TinyLlama
from mse_export.training.tiny.tokeniser import BOS, EOS, PAD, UNK

__all__ = ["write"]


def write(path: Path, model: TinyLlama, processor: Any) -> None:
    """Write the model and its vocabulary; matrices as F16, norms as F32 (llama.cpp's custom)."""
    config = model.config
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.width // config.heads)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _vocabulary(writer, processor)
    for name, value in _tensors(model):
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def _vocabulary(writer: gguf.GGUFWriter, processor: Any) -> None:
    tokens, scores, kinds = [], [], []
    for index in range(len(processor)):
        tokens.append(processor.id_to_piece(index).encode("utf-8"))
        scores.append(float(processor.get_score(index)))
        if processor.is_unknown(index):
            kinds.append(gguf.TokenType.UNKNOWN)
        elif processor.is_control(index):
            kinds.append(gguf.TokenType.CONTROL)
        elif processor.is_byte(index):
            kinds.append(gguf.TokenType.BYTE)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def _tensors(model: TinyLlama) -> list[tuple[str, NDArray[Any]]]:
    state = model.state_dict()

    def half(name: str) -> NDArray[np.float16]:
        return np.asarray(_array(state[name]), dtype=np.float16)

    def turned(name: str) -> NDArray[np.float16]:
        # llama.cpp rotates neighbouring channels, Hugging Face's layout the two halves.
        weight = half(name)
        split = weight.reshape(model.config.heads, 2, -1, weight.shape[1])
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))

    out: list[tuple[str, NDArray[Any]]] = [
        ("token_embd.weight", half("model.embed_tokens.weight")),
        ("output_norm.weight", _array(state["model.norm.weight"])),
        ("output.weight", half("lm_head.weight")),
    ]
    for k in range(model.config.layers):
        ours, theirs = f"blk.{k}", f"model.layers.{k}"
        out += [
            (f"{ours}.attn_norm.weight", _array(state[f"{theirs}.input_layernorm.weight"])),
            (f"{ours}.attn_q.weight", turned(f"{theirs}.self_attn.q_proj.weight")),
            (f"{ours}.attn_k.weight", turned(f"{theirs}.self_attn.k_proj.weight")),
            (f"{ours}.attn_v.weight", half(f"{theirs}.self_attn.v_proj.weight")),
            (f"{ours}.attn_output.weight", half(f"{theirs}.self_attn.o_proj.weight")),
            (f"{ours}.ffn_norm.weight", _array(state[f"{theirs}.post_attention_layernorm.weight"])),
            (f"{ours}.ffn_gate.weight", half(f"{theirs}.mlp.gate_proj.weight")),
            (f"{ours}.ffn_up.weight", half(f"{theirs}.mlp.up_proj.weight")),
            (f"{ours}.ffn_down.weight", half(f"{theirs}.mlp.down_proj.weight")),
        ]
    return out


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().float().numpy())
