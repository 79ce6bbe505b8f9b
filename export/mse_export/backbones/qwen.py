"""Qwen (first generation): fused c_attn with bias, `intermediate_size` is twice the width of w1.

published-model spec, section 3.2. The RMS epsilon is called `layer_norm_epsilon` in config.json
and must be written: llama.cpp has no default for it.
"""

from __future__ import annotations

from typing import Any

from mse_export.backbones.base import Config, TensorRecipe, number, refuse

ARCH = "qwen"
MODEL_TYPES: tuple[str, ...] = ("qwen",)
CLASSES: tuple[str, ...] = ("QWenLMHeadModel",)


def metadata(config: Config) -> dict[str, Any]:
    """GGUF keys without the `qwen.` prefix."""
    width, heads = int(number(config, "hidden_size")), int(number(config, "num_attention_heads"))
    if config.get("no_bias") is False:
        raise refuse("biases in every linear layer")
    if int(number(config, "kv_channels", default=width // heads)) * heads != width:
        raise refuse("heads that do not fill the hidden width")
    return {
        "context_length": int(number(config, "max_position_embeddings", "seq_length")),
        "embedding_length": width,
        "block_count": int(number(config, "num_hidden_layers")),
        "feed_forward_length": int(number(config, "intermediate_size")),
        "attention.head_count": heads,
        "attention.head_count_kv": heads,
        "attention.layer_norm_rms_epsilon": float(number(config, "layer_norm_epsilon")),
        "rope.dimension_count": width // heads,
        "rope.freq_base": float(number(config, "rotary_emb_base", default=10000.0)),
    }


def tensors(config: Config) -> list[TensorRecipe]:
    """Every tensor, in file order. w2 is the gate: c_proj(w1(x) * silu(w2(x)))."""
    width, vocab = int(number(config, "hidden_size")), int(number(config, "vocab_size"))
    ffn = int(number(config, "intermediate_size")) // 2
    recipes = [TensorRecipe("token_embd.weight", (vocab, width), "transformer.wte.weight")]
    for i in range(int(number(config, "num_hidden_layers"))):
        ours, theirs = f"blk.{i}", f"transformer.h.{i}"
        recipes += [
            TensorRecipe(f"{ours}.attn_norm.weight", (width,), f"{theirs}.ln_1.weight"),
            TensorRecipe(
                f"{ours}.attn_qkv.weight", (3 * width, width), f"{theirs}.attn.c_attn.weight"
            ),
            TensorRecipe(f"{ours}.attn_qkv.bias", (3 * width,), f"{theirs}.attn.c_attn.bias"),
            TensorRecipe(
                f"{ours}.attn_output.weight", (width, width), f"{theirs}.attn.c_proj.weight"
            ),
            TensorRecipe(f"{ours}.ffn_norm.weight", (width,), f"{theirs}.ln_2.weight"),
            TensorRecipe(f"{ours}.ffn_up.weight", (ffn, width), f"{theirs}.mlp.w1.weight"),
            TensorRecipe(f"{ours}.ffn_gate.weight", (ffn, width), f"{theirs}.mlp.w2.weight"),
            TensorRecipe(f"{ours}.ffn_down.weight", (width, ffn), f"{theirs}.mlp.c_proj.weight"),
        ]
    recipes.append(TensorRecipe("output_norm.weight", (width,), "transformer.ln_f.weight"))
    recipes.append(TensorRecipe("output.weight", (vocab, width), "lm_head.weight"))
    return recipes
