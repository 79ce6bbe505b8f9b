"""A built-in bundle's language model in PyTorch: trained against the very weights that will run."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mse_runtime.bundle import Bundle, load_bundle
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf
from mse_runtime.prompt import Tokenizer

__all__ = ["builtin_bundle", "open_builtin"]

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def builtin_bundle(name: str) -> Bundle:
    """The built-in bundle `name`."""
    from mse_runtime.bundle.hub import resolve_bundle

    return load_bundle(resolve_bundle(name))


def open_builtin(name: str) -> tuple[nn.Module, Tokenizer]:
    """Its language model, dequantised, and its tokeniser, which is llama.cpp's own."""
    from mse_runtime.backbone import Backbone

    path = builtin_bundle(name).gguf_path()
    with Gguf.open(path) as file:
        model = _llama(file)
    return model, Backbone.open(path, n_ctx=32)


def _llama(file: Gguf) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kv_heads = file.n_head, file.n_head_kv
    tied = "output.weight" not in file.tensors
    config = LlamaConfig(
        vocab_size=file.n_vocab,
        hidden_size=file.n_embd,
        intermediate_size=file.integer("llama.feed_forward_length"),
        num_hidden_layers=file.n_layer,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=float(file.value("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=float(file.value("llama.rope.freq_base", 10000.0)),
        max_position_embeddings=file.n_ctx_train,
        tie_word_embeddings=tied,
    )
    state = {
        "model.embed_tokens.weight": _tensor(file, "token_embd.weight"),
        "model.norm.weight": _tensor(file, "output_norm.weight"),
        "lm_head.weight": _tensor(file, "token_embd.weight" if tied else "output.weight"),
    }
    for i in range(file.n_layer):
        for theirs, ours in LAYER_NAMES.items():
            found = _tensor(file, f"blk.{i}.{theirs}.weight")
            if theirs in ("attn_q", "attn_k"):
                found = _half_split(found, heads if theirs == "attn_q" else kv_heads)
            state[f"model.layers.{i}.{ours}.weight"] = found
    model = LlamaForCausalLM(config)
    missing, unknown = model.load_state_dict(state, strict=False)
    if missing or unknown:
        raise BackboneError(f"{file.path}: tensors missing {missing[:3]} or unknown {unknown[:3]}.")
    return cast(nn.Module, model)


def _tensor(file: Gguf, name: str) -> Tensor:
    return torch.from_numpy(file.tensor(name).astype(np.float32))


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's interleaved rotary pairs to transformers' two halves of a head."""
    width = weight.shape[0] // heads
    return weight.view(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
