"""What the training tests work on: small Hugging Face folders, made-up features, golden models."""

from __future__ import annotations

import base64
import csv
import json
import lzma
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mse_export.training.progress import Reporter
    from mse_export.training.run import Arguments

ROOT = Path(__file__).resolve().parent.parent

SENTENCES = [
    "I am so happy with how this turned out",
    "this is the worst day of my life",
    "the table stands in the kitchen",
    "Rate the sentiment of a spoken sentence from -3.0 (very negative) to +3.0 (very positive)",
    "from the words, the voice and the face. Words: Voice and face: The sentiment is",
    "Name the emotion of a spoken sentence (neutral, joy or anger). The emotion is",
    "0 1 2 3 4 5 6 7 8 9 + - . +0.1 -1.2 +2.3 -0.4 5.6 7.8 9.0 <Multimodal> </Multimodal>",
]
EMOTIONS = ("anger", "joy", "neutral")


def sentencepiece_model(folder: Path, vocab: int = 380, specials: Sequence[str] = ()) -> None:
    """A real sentencepiece BPE model, learned from a few sentences, as `tokenizer.model`."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def llama_folder(folder: Path, *, width: int = 64, seed: int = 0) -> Path:
    """A Hugging Face folder with a random two-layer Llama and a working tokeniser."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece_model(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
            }
        )
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=380,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def qwen_folder(folder: Path, *, width: int = 32, seed: int = 0) -> Path:
    """A Qwen (the first) folder: fused weights under its own names, a tiktoken vocabulary."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    layers, inner, vocab = 2, 48, 256 + 3 + 205
    config = {
        "model_type": "qwen",
        "hidden_size": width,
        "intermediate_size": 2 * inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "kv_channels": width // 4,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 512,
        "vocab_size": vocab,
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [base64.b64encode(bytes([i])) + f" {i}".encode() for i in range(256)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=rng) * 0.2

    state = {
        "transformer.wte.weight": random(vocab, width),
        "transformer.ln_f.weight": 1 + random(width),
        "lm_head.weight": random(vocab, width),
    }
    for i in range(layers):
        at = f"transformer.h.{i}."
        state |= {
            f"{at}attn.c_attn.weight": random(3 * width, width),
            f"{at}attn.c_attn.bias": random(3 * width),
            f"{at}attn.c_proj.weight": random(width, width),
            f"{at}mlp.w1.weight": random(inner, width),
            f"{at}mlp.w2.weight": random(inner, width),
            f"{at}mlp.c_proj.weight": random(width, inner),
            f"{at}ln_1.weight": 1 + random(width),
            f"{at}ln_2.weight": 1 + random(width),
        }
    save_file(state, folder / "model.safetensors")
    return folder


def golden_model(source: Path, folder: Path) -> Path:
    """The Hugging Face folder of an end-to-end golden, its weights expanded."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((source / "model").iterdir()):
        if path.suffix != ".xz":
            shutil.copy2(path, folder)
            continue
        with lzma.open(path) as packed, (folder / path.stem).open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    return folder


def emotional_data(
    folder: Path,
    count: int = 30,
    *,
    seed: int = 0,
    change: Callable[[int, dict[str, Any], dict[str, str]], None] | None = None,
) -> Path:
    """A folder in the open format: the voice tells the emotion, everything else is noise.

    `change(i, arrays, row)` may spoil a sample before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        arrays: dict[str, Any] = {
            "audio": rng.normal(size=(int(rng.integers(4, 30)), 13)).astype(np.float32),
            "video": rng.normal(size=(int(rng.integers(2, 9)), 167)).astype(np.float32),
        }
        arrays["audio"][:, 2] += 4 * (i % 3)
        row = {
            "id": f"c{i}",
            "features": f"c{i}.npz",
            "text": SENTENCES[int(rng.integers(3))],
            "label": EMOTIONS[i % 3],
            "split": ("train", "train", "train", "valid", "test")[i // 3 % 5],
        }
        if change:
            change(i, arrays, row)
        np.savez(folder / f"c{i}.npz", **arrays)
        rows.append(row)
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def arguments(backbone: Path | str, data: Path, output: Path, **changes: Any) -> Arguments:
    """A short run's arguments."""
    from mse_export.training.run import Arguments

    plain = Arguments(str(backbone), "mine", data, output, epochs=2, batch=6, lr=2e-3)
    return replace(plain, **changes)


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self) -> Reporter:
        from mse_export.training.progress import Reporter

        return Reporter(self.lines.append)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def environment() -> dict[str, str]:
    """For commands run as a user would."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "export", "kernels"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
