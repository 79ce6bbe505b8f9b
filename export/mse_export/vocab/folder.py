"""The tokeniser of a Hugging Face folder, by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mse_export.vocab import Vocabulary
from mse_export.vocab.bpe import bpe_vocabulary
from mse_export.vocab.spm import CHATGLM3_CONTROL, sentencepiece_vocabulary
from mse_export.vocab.tiktoken import tiktoken_vocabulary

__all__ = ["folder_vocabulary"]


def folder_vocabulary(folder: Path, arch: str, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that goes into the GGUF; BackboneError where a file is missing or foreign."""
    size = int(config.get("padded_vocab_size") or config["vocab_size"])
    if arch == "chatglm":
        return sentencepiece_vocabulary(folder, size, control=CHATGLM3_CONTROL, add_bos=False)
    if arch == "qwen":
        return tiktoken_vocabulary(folder, size)
    if arch == "llama" and (folder / "tokenizer.model").is_file():
        return sentencepiece_vocabulary(folder, size)
    return bpe_vocabulary(folder, size, dict(config))
