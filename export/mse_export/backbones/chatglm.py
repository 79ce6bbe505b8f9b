"""ChatGLM3: fused QKV with bias, two key-value groups, SwiGLU fused into one matrix.

Rotary embedding turns the first half of each head, in interleaved pairs, theta 10000
(published-model spec, section 3.3); rows need no reordering.
"""

from __future__ import annotations

from typing import Any

from mse_export.backbones.base import Config, TensorRecipe, number, refuse

ARCH = "chatglm"
MODEL_TYPES: tuple[str, ...] = ("chatglm",)
CLASSES: tuple[str, ...] = ("ChatGLMModel", "ChatGLMForConditionalGeneration")


def metadata(config: Config) -> dict[str, Any]:
    """GGUF keys without the `chatglm.` prefix."""
    width, heads = int(number(config, "hidden_size")), int(number(config, "num_attention_heads"))
    if int(number(config, "kv_channels", default=width // heads)) * heads != width:
        raise refuse("heads that do not fill the hidden width")
    if config.get("add_bias_linear") or config.get("rmsnorm") is False:
        raise refuse("LayerNorm or linear biases (an older ChatGLM)")
    if config.get("apply_residual_connection_post_layernorm"):
        raise refuse("residuals taken after the norm")
    groups = int(number(config, "multi_query_group_num")) if _grouped(config) else heads
    return {
        "context_length": int(number(config, "seq_length")),
        "embedding_length": width,
        "block_count": int(number(config, "num_layers")),
        "feed_forward_length": int(number(config, "ffn_hidden_size")),
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "attention.layer_norm_rms_epsilon": float(number(config, "layernorm_epsilon")),
        "rope.dimension_count": width // heads // 2,
        "rope.freq_base": 10000.0 * float(number(config, "rope_ratio", default=1.0)),
    }


def _grouped(config: Config) -> bool:
    return bool(config.get("multi_query_attention"))


def tensors(config: Config) -> list[TensorRecipe]:
    """Every tensor, in file order."""
    width, heads = int(number(config, "hidden_size")), int(number(config, "num_attention_heads"))
    dim, ffn = width // heads, int(number(config, "ffn_hidden_size"))
    vocab = int(number(config, "padded_vocab_size", "vocab_size"))
    groups = int(number(config, "multi_query_group_num")) if _grouped(config) else heads
    fused = width + 2 * groups * dim
    embedding = "transformer.embedding.word_embeddings.weight"
    recipes = [TensorRecipe("token_embd.weight", (vocab, width), embedding)]
    for i in range(int(number(config, "num_layers"))):
        ours, theirs = f"blk.{i}", f"transformer.encoder.layers.{i}"
        qkv = f"{theirs}.self_attention.query_key_value"
        recipes += [
            TensorRecipe(f"{ours}.attn_norm.weight", (width,), f"{theirs}.input_layernorm.weight"),
            TensorRecipe(f"{ours}.attn_qkv.weight", (fused, width), f"{qkv}.weight"),
        ]
        if config.get("add_qkv_bias"):
            recipes.append(TensorRecipe(f"{ours}.attn_qkv.bias", (fused,), f"{qkv}.bias"))
        recipes += [
            TensorRecipe(
                f"{ours}.attn_output.weight",
                (width, width),
                f"{theirs}.self_attention.dense.weight",
            ),
            TensorRecipe(
                f"{ours}.ffn_norm.weight", (width,), f"{theirs}.post_attention_layernorm.weight"
            ),
            TensorRecipe(
                f"{ours}.ffn_up.weight", (2 * ffn, width), f"{theirs}.mlp.dense_h_to_4h.weight"
            ),
            TensorRecipe(
                f"{ours}.ffn_down.weight", (width, ffn), f"{theirs}.mlp.dense_4h_to_h.weight"
            ),
        ]
    recipes.append(
        TensorRecipe("output_norm.weight", (width,), "transformer.encoder.final_layernorm.weight")
    )
    if not config.get("tie_word_embeddings"):
        recipes.append(
            TensorRecipe("output.weight", (vocab, width), "transformer.output_layer.weight")
        )
    return recipes
