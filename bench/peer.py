"""Peer (a), the published way: a transformers backbone of the same shape, the adapter in torch,
`inputs_embeds`, `generate`. Random weights, made in memory.

Started by the other benches in a process of its own: reads one JSON request from its arguments,
then a command per line ("answer", "prefill", "memory"), and answers each with a JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import SHAPES, use_sources

use_sources()


def config(shape: str, gguf: str) -> Any:
    """The transformers configuration of a shape.

    Qwen (v1) has no class in transformers; Qwen 2 computes the same layers. Its 11008 counts both
    halves of the gated unit, transformers' `intermediate_size` one.
    """
    import transformers as t

    if shape == "tiny":
        return _tiny(gguf)
    from mse_export.profiles import named_backbone

    c = named_backbone(shape).config
    if shape == "qwen-1.8b":
        return t.Qwen2Config(
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"] // 2,
            num_hidden_layers=c["num_hidden_layers"],
            num_attention_heads=c["num_attention_heads"],
            num_key_value_heads=c["num_attention_heads"],
            max_position_embeddings=c["max_position_embeddings"],
        )
    if shape == "chatglm3-6b":
        return t.GlmConfig(
            vocab_size=c["padded_vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["ffn_hidden_size"],
            num_hidden_layers=c["num_layers"],
            num_attention_heads=c["num_attention_heads"],
            num_key_value_heads=c["multi_query_group_num"],
            head_dim=c["kv_channels"],
            attention_bias=True,
            pad_token_id=0,
        )
    return t.LlamaConfig(**{k: v for k, v in c.items() if k not in ("model_type", "architectures")})


def _tiny(gguf: str) -> Any:
    import transformers as t

    from mse_runtime.gguf import Gguf

    with Gguf.open(gguf) as g:
        return t.LlamaConfig(
            vocab_size=g.n_vocab,
            hidden_size=g.n_embd,
            intermediate_size=g.integer("{arch}.feed_forward_length"),
            num_hidden_layers=g.n_layer,
            num_attention_heads=g.integer("{arch}.attention.head_count"),
            num_key_value_heads=g.n_head_kv,
        )


def bytes_needed(shape: str, gguf: str, dtype: str) -> int:
    """Bytes of the weights alone, without making them."""
    import torch
    import transformers as t

    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(config(shape, gguf))
    return sum(p.numel() for p in model.parameters()) * (2 if dtype == "bf16" else 4)


class Peer:
    """The published model, ready to answer one request again and again."""

    def __init__(self, wanted: dict[str, Any], dtype: str, device: str, threads: int) -> None:
        import torch
        import transformers as t
        from bundles import features
        from safetensors.torch import load_file

        from mse_export.adapter import adapter_from_state
        from mse_runtime.bundle import load_bundle

        torch.set_num_threads(threads)
        self.torch, self.device, self.wanted = torch, device, wanted
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        with torch.device("meta"):
            model = t.AutoModelForCausalLM.from_config(config(wanted["shape"], wanted["gguf"]))
        self.model = _filled(model.to(kind).to_empty(device=device)).eval()
        _rotary(self.model, device)
        state = load_file(str(Path(wanted["bundle"]) / "adapter.safetensors"))
        self.adapter = adapter_from_state({k: v.float() for k, v in state.items()})
        self.adapter = self.adapter.to(device).eval()
        bundle = load_bundle(wanted["bundle"])
        found = features(bundle)
        self.audio = torch.from_numpy(found.audio.values)
        self.face = torch.from_numpy(found.face.values)

    def answer(self, new_tokens: int) -> float:
        """Seconds from features and token ids to the generated ids."""
        torch, wanted = self.torch, self.wanted
        begun = time.perf_counter()
        with torch.inference_mode():
            table = self.model.get_input_embeddings()

            def embed(ids: list[int]) -> Any:
                return table(torch.tensor([ids], device=self.device, dtype=torch.long))

            text = embed(wanted["text"])

            def length(x: Any) -> Any:
                return torch.tensor([x.shape[-2]], device=self.device)

            pseudo = self.adapter(
                self.audio[None].to(self.device), length(self.audio),
                self.face[None].to(self.device), length(self.face),
                text.float(), length(text),
            )  # fmt: skip
            rows = torch.cat(
                [embed(wanted["early"]), pseudo.to(text.dtype), embed(wanted["late"])], dim=1
            )
            ids = self.model.generate(
                inputs_embeds=rows,
                attention_mask=torch.ones(rows.shape[:2], device=self.device, dtype=torch.long),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            ids.tolist()
        return time.perf_counter() - begun


def _filled(model: Any) -> Any:
    """Weights that keep activations finite: a block of noise repeated, norms 1, biases 0."""
    import torch

    noise = torch.randn(1 << 20) * 0.02
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            flat, part = weight.view(-1), noise.to(weight.dtype).to(weight.device)
            for start in range(0, flat.numel(), len(part)):
                piece = flat[start : start + len(part)]
                piece.copy_(part[: len(piece)])
    return model


def _rotary(model: Any, device: str) -> None:
    """Rotary tables are buffers that `to_empty` leaves undefined: make them anew."""
    for _, module in model.named_modules():
        if hasattr(module, "rope_init_fn") and hasattr(module, "inv_freq"):
            module.inv_freq, module.attention_scaling = module.rope_init_fn(module.config, device)
            module.original_inv_freq = module.inv_freq


def serve(peer: Peer) -> None:
    from mse_runtime.memory import measured

    new_tokens = int(peer.wanted["new_tokens"])
    for text in sys.stdin:
        command = text.strip()
        if command == "memory":
            reply = {"peak_mb": measured().peak_rss / 1e6}
        else:
            reply = {"seconds": peer.answer(1 if command == "prefill" else new_tokens)}
        print(json.dumps(reply), flush=True)


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("request", help=f"JSON: shape (of {', '.join(SHAPES)}), gguf, bundle, ids")
    made.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=2)
    args = made.parse_args()
    wanted = json.loads(args.request)
    peer = Peer(wanted, args.dtype, args.device, args.threads)
    print(json.dumps({"ready": True}), flush=True)
    serve(peer)


if __name__ == "__main__":
    main()
