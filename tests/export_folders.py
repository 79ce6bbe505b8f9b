"""Tiny Hugging Face folders, one per architecture, with random weights and real tokenisers."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from goldens import detgen
from numpy.typing import NDArray

from mse_export.backbones import architecture

CORPUS = (
    "I really love this movie and the acting is great. It was a sad and boring film, 3 out of 10. "
    "Okay. so um the plot is kind of weird but the ending made me smile a lot. Please predict the "
    "sentiment intensity of the above multimodal content in the range [-3.0, +3.0]. Assistant: "
    "The sentiment is neutral, surprise, fear, sadness, joy, disgust, anger. -0.8 +1.2 <Multimodal>"
    " </Multimodal> don't you'll I've she's they're 0123456789. Name the emotion of the voice. "
)
SIZE = 480

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": SIZE,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama3": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": True,
        "vocab_size": SIZE,
        "bos_token_id": SIZE - 3,
        "eos_token_id": SIZE - 2,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": SIZE,
        "bos_token_id": SIZE - 3,
        "eos_token_id": SIZE - 3,
    },
    "qwen": {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "max_position_embeddings": 512,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "no_bias": True,
        "vocab_size": SIZE,
    },
    "chatglm": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "layernorm_epsilon": 1e-5,
        "seq_length": 512,
        "padded_vocab_size": SIZE + 16,
        "vocab_size": SIZE + 16,
    },
}


def make_folder(
    path: Path, kind: str, *, shards: int = 1, dtype: str = "F32", **changes: Any
) -> Path:
    """A complete folder of `kind` (a key of CONFIGS); `changes` go into config.json."""
    path.mkdir(parents=True)
    config = CONFIGS[kind] | changes
    (path / "config.json").write_text(json.dumps(config))
    _tokeniser(path, kind)
    tensors = _weights(config)
    names = list(tensors)
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors, dtype)
        return path
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        write_safetensors(path / name, part, dtype)
        weight_map |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def _weights(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Every source tensor; scales that give logits of order 1."""
    tensors = {}
    for seed, recipe in enumerate(architecture(config).tensors(config)):
        if not recipe.source:
            continue
        if recipe.name.endswith("_norm.weight"):
            values = 1 + detgen(seed, recipe.shape, 0.3)
        elif recipe.name.endswith("bias"):
            values = detgen(seed, recipe.shape, 0.5)
        elif recipe.name == "token_embd.weight":
            values = detgen(seed, recipe.shape, 1.0)
        else:
            values = detgen(seed, recipe.shape, float(np.sqrt(6.0 / recipe.shape[-1])))
        tensors[recipe.source] = values
    return tensors


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.float32]], dtype: str) -> None:
    header: dict[str, Any] = {}
    blobs = []
    offset = 0
    for name, values in tensors.items():
        if dtype == "F32":
            blob = values.tobytes()
        elif dtype == "F16":
            blob = values.astype(np.float16).tobytes()
        else:  # bf16 by truncation
            blob = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def _tokeniser(path: Path, kind: str) -> None:
    if kind in ("llama", "chatglm"):
        _sentencepiece(path)
    elif kind == "qwen":
        _tiktoken(path)
    else:
        _bpe(path, kind)


def _sentencepiece(path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS]),
        model_writer=model,
        vocab_size=SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())


def trained_merges(count: int) -> list[tuple[bytes, bytes]]:
    """`count` merges of a byte-level BPE over the corpus' words."""
    words: dict[tuple[bytes, ...], int] = {}
    for i, word in enumerate(CORPUS.split(" ")):
        text = ((" " if i else "") + word).encode()
        key = tuple(bytes([b]) for b in text)
        words[key] = words.get(key, 0) + 1
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < count:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + times
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merged(word, best): times for word, times in words.items()}
    return merges


def _merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    parts: list[bytes] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)


def _ranks() -> list[bytes]:
    return [bytes([b]) for b in range(256)] + [a + b for a, b in trained_merges(200)]


def _tiktoken(path: Path) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(_ranks()))
    (path / "qwen.tiktoken").write_text("".join(lines))


def _bpe(path: Path, kind: str) -> None:
    from mse_export.vocab.bpe import PRE_TOKENIZERS
    from mse_export.vocab.synthetic import byte_alphabet

    alphabet = byte_alphabet()

    def spelled(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    wanted = "qwen2" if kind == "qwen2" else "llama-bpe"
    pattern = next(regex for regex, name in PRE_TOKENIZERS.items() if name == wanted)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": SIZE - 3 + i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, name in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind == "llama3",
            "vocab": {spelled(token): i for i, token in enumerate(_ranks())},
            "merges": [f"{spelled(a)} {spelled(b)}" for a, b in trained_merges(200)],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
