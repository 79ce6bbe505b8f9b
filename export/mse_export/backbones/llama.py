"""Llama 2 and 3: separate projections, grouped-query attention, rotary rows interleaved.

Hugging Face stores query and key rows half-split per head, llama.cpp expects pairs.
"""

from __future__ import annotations

from typing import Any

from mse_export.backbones.base import Config, TensorRecipe, number, refuse, rope_inverse_factors

ARCH = "llama"
MODEL_TYPES: tuple[str, ...] = ("llama",)
CLASSES: tuple[str, ...] = ("LlamaForCausalLM",)


def head_dim(config: Config) -> int:
    heads = int(number(config, "num_attention_heads"))
    return int(number(config, "head_dim", default=int(number(config, "hidden_size")) // heads))


def metadata(config: Config) -> dict[str, Any]:
    """GGUF keys without the `llama.` prefix."""
    heads = int(number(config, "num_attention_heads"))
    values: dict[str, Any] = {
        "context_length": int(number(config, "max_position_embeddings")),
        "embedding_length": int(number(config, "hidden_size")),
        "block_count": int(number(config, "num_hidden_layers")),
        "feed_forward_length": int(number(config, "intermediate_size")),
        "attention.head_count": heads,
        "attention.head_count_kv": int(number(config, "num_key_value_heads", default=heads)),
        "attention.layer_norm_rms_epsilon": float(number(config, "rms_norm_eps")),
        "rope.dimension_count": head_dim(config),
        "rope.freq_base": float(number(config, "rope_theta", default=10000.0)),
        "vocab_size": int(number(config, "vocab_size")),
    }
    if head_dim(config) * heads != values["embedding_length"]:
        values["attention.key_length"] = values["attention.value_length"] = head_dim(config)
    return values


def tensors(config: Config) -> list[TensorRecipe]:
    """Every tensor, in file order."""
    return decoder(config, interleave=True, qkv_bias=bool(config.get("attention_bias")))


def decoder(config: Config, *, interleave: bool, qkv_bias: bool) -> list[TensorRecipe]:
    """Llama-shaped decoder with separate q, k, v (also Qwen2's)."""
    if config.get("mlp_bias"):
        raise refuse("biases in the feed-forward layers")
    width, ffn = int(number(config, "hidden_size")), int(number(config, "intermediate_size"))
    heads = int(number(config, "num_attention_heads"))
    kv_heads = int(number(config, "num_key_value_heads", default=heads))
    dim, vocab = head_dim(config), int(number(config, "vocab_size"))
    recipes = [TensorRecipe("token_embd.weight", (vocab, width), "model.embed_tokens.weight")]
    factors = rope_inverse_factors(config, dim)
    if factors is not None:
        recipes.append(TensorRecipe("rope_freqs.weight", (len(factors),), "", values=factors))
    for i in range(int(number(config, "num_hidden_layers"))):
        ours, theirs = f"blk.{i}", f"model.layers.{i}"
        recipes.append(
            TensorRecipe(f"{ours}.attn_norm.weight", (width,), f"{theirs}.input_layernorm.weight")
        )
        for letter, count, turn in (
            ("q", heads, True),
            ("k", kv_heads, True),
            ("v", kv_heads, False),
        ):
            order = count if interleave and turn else 0
            source = f"{theirs}.self_attn.{letter}_proj"
            recipes.append(
                TensorRecipe(
                    f"{ours}.attn_{letter}.weight", (count * dim, width), f"{source}.weight", order
                )
            )
            if qkv_bias:
                recipes.append(
                    TensorRecipe(
                        f"{ours}.attn_{letter}.bias", (count * dim,), f"{source}.bias", order
                    )
                )
        recipes += [
            TensorRecipe(
                f"{ours}.attn_output.weight",
                (width, heads * dim),
                f"{theirs}.self_attn.o_proj.weight",
            ),
            TensorRecipe(
                f"{ours}.ffn_norm.weight", (width,), f"{theirs}.post_attention_layernorm.weight"
            ),
            TensorRecipe(f"{ours}.ffn_gate.weight", (ffn, width), f"{theirs}.mlp.gate_proj.weight"),
            TensorRecipe(f"{ours}.ffn_up.weight", (ffn, width), f"{theirs}.mlp.up_proj.weight"),
            TensorRecipe(f"{ours}.ffn_down.weight", (width, ffn), f"{theirs}.mlp.down_proj.weight"),
        ]
        if qkv_bias and interleave:
            recipes.append(
                TensorRecipe(
                    f"{ours}.attn_output.bias", (width,), f"{theirs}.self_attn.o_proj.bias"
                )
            )
    recipes.append(TensorRecipe("output_norm.weight", (width,), "model.norm.weight"))
    if not config.get("tie_word_embeddings"):
        recipes.append(TensorRecipe("output.weight", (vocab, width), "lm_head.weight"))
    return recipes
