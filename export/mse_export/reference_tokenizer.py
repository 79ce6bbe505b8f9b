"""The folder's own tokeniser, as the yardstick for the GGUF's: text -> ids."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from mse_runtime.errors import BackboneError

__all__ = ["reference_tokenizer", "sample_strings"]

Encode = Callable[[str], list[int]]


def reference_tokenizer(folder: Path, arch: str) -> Encode:
    """The Hugging Face (or sentencepiece, tiktoken) tokeniser of a folder.

    Spellings of special tokens count as ordinary text.
    """
    if arch == "chatglm":
        # ChatGLM3's tokeniser class, remote code, is this model plus control tokens.
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        return lambda text: list(processor.encode(text))
    if arch == "qwen":
        return _tiktoken(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BackboneError(f"The tokeniser in {folder} cannot be opened ({error}).") from error
    fast = getattr(tokenizer, "_tokenizer", None)
    if fast is not None:
        fast.encode_special_tokens = True
        return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    return lambda text: list(
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )


def _tiktoken(folder: Path) -> Encode:
    """Qwen's own splitting expression over its ranks; the class normalises to NFC first."""
    import unicodedata

    import tiktoken

    from mse_export.vocab.bpe import PRE_TOKENIZERS
    from mse_export.vocab.tiktoken import read_ranks

    pattern = next(regex for regex, name in PRE_TOKENIZERS.items() if name == "qwen2")
    encoding = tiktoken.Encoding(
        "qwen",
        pat_str=pattern,
        mergeable_ranks=read_ranks(sorted(folder.glob("*.tiktoken"))[0]),
        special_tokens={},
    )
    return lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text))


_FRAGMENTS = (
    "I really love this movie", "It was a sad, boring film.", "Okay.", "don't you'll I've she's",
    "3 out of 10", "-0.8", "+2.4", "1234567890", "3.14159", "[-3.0, +3.0]", "<neutral:0, joy:4>",
    "<Multimodal>", "</Multimodal>", "{question}", "这部电影真的很好看", "我不喜欢，太无聊了！",
    "范围在[-1.0, 1.0]之间", "情感为", "😀", "👩‍👩‍👧‍👦", "🎉🔥", "naïve café", "Привет",
    "こんにちは", "안녕", "  ", "   \t ", "\n", "\n\n", "\r\n", "a\u00a0b", "<s>", "</s>", "<unk>",
    "<|im_start|>", "<|endoftext|>", "[gMASK]", "sop", "op", "eop", "dropout", "<|user|>", "<0x41>",
    "▁", "Ġ", "...", "?!", "@#$%^&*()", "x=1;y=2", "http://a.b/c?d=e", "ALL CAPS", "MiXeD", "'",
    '"', "_under_", "ﬁ", "½", "№", "e\u0301",
)  # fmt: skip


def sample_strings(count: int, seed: int = 0) -> list[str]:
    """`count` strings: sentences, digits, Chinese, emoji, whitespace, look-alikes, mixtures."""
    generator = random.Random(seed)
    strings = list(_FRAGMENTS)
    strings += [" " * n + "x" + " " * n for n in range(1, 12)]
    while len(strings) < count:
        parts = [generator.choice(_FRAGMENTS) for _ in range(generator.randint(1, 6))]
        strings.append(generator.choice(("", " ", "  ", "\n")).join(parts))
    return strings[:count]
