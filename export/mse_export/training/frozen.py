"""The frozen language model: a Hugging Face folder as a PyTorch module that takes embeddings.

No remote code is run. ChatGLM3 and Qwen (the first) have no class in transformers under their own
name, but their computation (published-model spec, sections 3.2 and 3.3) is that of GLM and Qwen2
with renamed, fused weights: those are split on loading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mse_export.profiles import published_rope_table
from mse_export.training.builtin import open_builtin
from mse_export.training.tokenizers import open_tokenizer
from mse_runtime.errors import BackboneError, DeviceError
from mse_runtime.prompt import Tokenizer

__all__ = ["Frozen", "Precision", "open_frozen"]

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Their head is a plain matrix product on the decoder's output, so only the rows that carry a loss
# need go through it.
PLAIN_HEAD = {"llama", "qwen2", "qwen3", "mistral", "glm", "phi3"}


@dataclass
class Frozen:
    """A language model without gradients on its weights, and its tokeniser."""

    model: nn.Module
    tokenizer: Tokenizer
    arch: str
    source: str

    @property
    def n_embd(self) -> int:
        return int(self.embeddings.weight.shape[1])

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def embeddings(self) -> nn.Embedding:
        table: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return table

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the input table as float32, without a gradient: ids [...] -> [..., D]."""
        with torch.no_grad():
            rows: Tensor = self.embeddings(ids.to(self.device)).float()
        return rows

    def logits(
        self,
        rows: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Float32 logits [B, k, n_vocab] at `positions` [B, k] of the sequences `rows` [B, L, D].

        Attention is causal, or as `mask` [B, 1, L, L] (bool, True where a row may look) says.
        """
        rows = rows.to(self.embeddings.weight.dtype)
        extra: dict[str, Any] = {"use_cache": False}
        if mask is not None:
            low = torch.finfo(rows.dtype).min
            extra["attention_mask"] = torch.zeros(
                mask.shape, dtype=rows.dtype, device=rows.device
            ).masked_fill(~mask, low)
        if position_ids is not None:
            extra["position_ids"] = position_ids
        index = positions[..., None]
        model: Any = self.model
        if model.config.model_type in PLAIN_HEAD:
            hidden = model.get_decoder()(inputs_embeds=rows, **extra).last_hidden_state
            hidden = hidden.gather(1, index.expand(-1, -1, hidden.shape[2]))
            found: Tensor = model.get_output_embeddings()(hidden)
        else:
            full = model(inputs_embeds=rows, **extra).logits
            found = full.gather(1, index.expand(-1, -1, full.shape[2]))
        return found.float()

    def round_rotary(self) -> None:
        """Round the rotary tables to bf16 where the published code's models hold them so.

        The published loader makes Llama's and Qwen 2's while bf16 is the default type, so they keep
        8 bits; nothing else of its arithmetic is bf16. Without it the loss differs in the third
        decimal. Which architectures these are stands in `profiles.toml`.
        """

        def rounded(_: nn.Module, __: Any, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(table.bfloat16().to(table.dtype) for table in tables)

        if published_rope_table(self.arch) is None:
            return
        for module in self.model.modules():
            if hasattr(module, "inv_freq"):
                module.register_forward_hook(rounded)

    def checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        model: Any = self.model
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; dropout is off
        else:
            model.gradient_checkpointing_disable()
            model.eval()


def open_frozen(
    source: str | Path,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    four_bit: bool = False,
) -> Frozen:
    """The language model of a Hugging Face folder, of a backbone's name, or of the bundle `tiny`.

    Raises BackboneError for a folder that is no language model, DeviceError for too little memory.
    """
    if str(source) == "tiny":
        return _freeze(Frozen(*open_builtin("tiny"), "llama", "tiny"), device, precision)
    folder = _named_folder(str(source)) or Path(source).expanduser()
    config = _read_config(folder)
    model_type = str(config.get("model_type", ""))
    try:
        model = _load(folder, model_type, config, DTYPES[precision], four_bit, device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(
            f"{folder} does not fit into the memory of {device} as {precision}. Try --precision "
            "bf16, --4bit (GPU), or a smaller backbone."
        ) from error
    frozen = Frozen(model, open_tokenizer(folder, model_type), model_type, str(folder))
    return _freeze(frozen, device, None if four_bit else precision)


def _named_folder(name: str) -> Path | None:
    """The local folder of a backbone that `mse-export --list` names (downloaded where needed)."""
    from mse_export.profiles import backbone_names
    from mse_export.resolve import resolve_backbone

    return resolve_backbone(name).path if name in backbone_names() else None


def _freeze(frozen: Frozen, device: str, precision: Precision | None) -> Frozen:
    if precision is not None:
        frozen.model.to(device=device, dtype=DTYPES[precision])
    frozen.model.requires_grad_(False)
    module: Any
    for module in frozen.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    frozen.model.eval()
    return frozen


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{folder} is no Hugging Face folder: config.json cannot be read ({error}). Training "
            "needs the model's folder (config.json, *.safetensors, tokenizer files), not a GGUF; "
            "or use --backbone tiny."
        ) from error
    if not isinstance(config, dict):
        raise BackboneError(f"{folder}/config.json is not a JSON object.")
    return config


def _load(
    folder: Path,
    model_type: str,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    four_bit: bool,
    device: str,
) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if model_type in ("chatglm", "qwen"):
        if four_bit:
            raise BackboneError("--4bit is not available for ChatGLM3 and Qwen-1.8B; use bf16.")
        convert = _chatglm if model_type == "chatglm" else _qwen
        return convert(config, _tensors(folder), dtype)
    extra: dict[str, Any] = {"dtype": dtype}
    if four_bit:
        extra["quantization_config"] = _four_bit(device)
        extra["device_map"] = {"": device}
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **extra
        )
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"{folder} cannot be opened as a language model ({type(error).__name__}: {error}). "
            "Check that every shard of the weights is there."
        ) from error
    return model


def _four_bit(device: str) -> Any:
    import importlib.util

    if not device.startswith("cuda") or importlib.util.find_spec("bitsandbytes") is None:
        raise DeviceError(
            "--4bit needs an NVIDIA GPU and bitsandbytes (pip install bitsandbytes). Without them "
            "use --precision bf16."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise BackboneError(f"{folder} has no *.safetensors. Download the whole repository.")
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            found |= load_file(path)
        except Exception as error:  # safetensors has its own error class per binding
            raise BackboneError(f"{path} is damaged ({error}). Download it again.") from error
    return found


def _assemble(model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    missing, unknown = model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True
    )
    if missing or unknown:
        raise BackboneError(
            f"The weights do not fit the configuration: missing {list(missing)[:3]}, unknown "
            f"{list(unknown)[:3]}."
        )
    return model


def _empty(make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters take no memory until they are assigned."""
    with torch.device("meta"):
        model = make()
    for module in model.modules():  # rotary tables are not in any file
        if hasattr(module, "inv_freq") and hasattr(module, "rope_init_fn"):
            table, _ = module.rope_init_fn(module.config, torch.device("cpu"))  # type: ignore[operator]
            module.register_buffer("inv_freq", table, persistent=False)
            module.original_inv_freq = table
    return model


def _chatglm(
    config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """ChatGLM3: rotary on half of each head in interleaved pairs, fused QKV, two KV groups."""
    from transformers import GlmConfig, GlmForCausalLM

    heads, width = int(config["num_attention_heads"]), int(config["kv_channels"])
    groups = int(config["multi_query_group_num"]) if config["multi_query_attention"] else heads
    shape = GlmConfig(
        vocab_size=tensors["transformer.output_layer.weight"].shape[0],
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["ffn_hidden_size"]),
        num_hidden_layers=int(config["num_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        partial_rotary_factor=0.5,
        rms_norm_eps=float(config["layernorm_epsilon"]),
        rope_theta=10000.0 * float(config.get("rope_ratio", 1.0)),
        max_position_embeddings=int(config["seq_length"]),
        attention_bias=bool(config["add_qkv_bias"]),
        attention_dropout=0.0,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    state = {
        "model.embed_tokens.weight": tensors["transformer.embedding.word_embeddings.weight"],
        "model.norm.weight": tensors["transformer.encoder.final_layernorm.weight"],
        "lm_head.weight": tensors["transformer.output_layer.weight"],
    }
    for i in range(shape.num_hidden_layers):
        old, new = f"transformer.encoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            fused = tensors.get(f"{old}self_attention.query_key_value.{kind}")
            if fused is not None:
                parts = torch.split(fused, [heads * width, groups * width, groups * width])
                for name, part in zip("qkv", parts, strict=True):
                    state[f"{new}self_attn.{name}_proj.{kind}"] = part
        for theirs, ours in (
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            state[f"{new}{ours}.weight"] = tensors[f"{old}{theirs}.weight"]
    return _assemble(_empty(lambda: GlmForCausalLM(shape)), state, dtype)


def _qwen(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Qwen (the first): fused c_attn, MLP c_proj(w1(x) * silu(w2(x))), so w2 is the gate."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    width = int(config["hidden_size"])
    shape = Qwen2Config(
        vocab_size=int(config["vocab_size"]),
        hidden_size=width,
        intermediate_size=int(config["intermediate_size"]) // 2,
        num_hidden_layers=int(config["num_hidden_layers"]),
        num_attention_heads=int(config["num_attention_heads"]),
        num_key_value_heads=int(config["num_attention_heads"]),
        rms_norm_eps=float(config["layer_norm_epsilon"]),
        rope_theta=float(config.get("rotary_emb_base", 10000)),
        max_position_embeddings=int(config.get("max_position_embeddings", 8192)),
        tie_word_embeddings=False,
        use_sliding_window=False,
    )
    state = {
        "model.embed_tokens.weight": tensors["transformer.wte.weight"],
        "model.norm.weight": tensors["transformer.ln_f.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(shape.num_hidden_layers):
        old, new = f"transformer.h.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            fused = tensors[f"{old}attn.c_attn.{kind}"]
            for name, part in zip("qkv", torch.split(fused, width), strict=True):
                state[f"{new}self_attn.{name}_proj.{kind}"] = part
        for theirs, ours in (
            ("attn.c_proj", "self_attn.o_proj"),
            ("mlp.w1", "mlp.up_proj"),
            ("mlp.w2", "mlp.gate_proj"),
            ("mlp.c_proj", "mlp.down_proj"),
            ("ln_1", "input_layernorm"),
            ("ln_2", "post_attention_layernorm"),
        ):
            state[f"{new}{ours}.weight"] = tensors[f"{old}{theirs}.weight"]
    return _assemble(_empty(lambda: Qwen2ForCausalLM(shape)), state, dtype)
