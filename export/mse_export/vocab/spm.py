"""Sentencepiece vocabularies (Llama 2, ChatGLM3) for llama.cpp's "llama" tokeniser.

Both are byte-pair encodings by score. ChatGLM3 appends control tokens that its tokeniser class
knows only in code: [MASK], [gMASK], [sMASK], sop, eop and the chat roles, from the first id after
the pieces (published-model spec, section 3.3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mse_export.vocab import Kind, Vocabulary
from mse_runtime.errors import BackboneError

__all__ = ["CHATGLM3_CONTROL", "read_added_tokens", "sentencepiece_vocabulary"]

CHATGLM3_CONTROL = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
UNUSED_SCORE = -1000.0


def read_added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Tokens beside the vocabulary, by id: (spelling, whether it is special)."""
    added: dict[int, tuple[str, bool]] = {}
    for name, entry in _json(folder / "added_tokens.json").items():
        added[int(entry)] = (name, True)
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    for index, entry in decoder.items():
        added[int(index)] = (entry["content"], bool(entry.get("special")))
    return added


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BackboneError(f"{path} is not JSON ({error}). Download it again.") from error
    return data if isinstance(data, dict) else {}


def sentencepiece_vocabulary(
    folder: Path,
    size: int,
    *,
    control: tuple[str, ...] = (),
    special: Mapping[str, int] | None = None,
    add_bos: bool = True,
) -> Vocabulary:
    """`tokenizer.model` as a vocabulary of `size` tokens.

    control: control tokens that follow the pieces directly. special: ids by role where they differ
    from the model's own.
    """
    import sentencepiece

    path = folder / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            f"{path} cannot be read as a sentencepiece model. Download the tokeniser again."
        ) from error
    _check_kind(path)
    count = processor.GetPieceSize()
    if count + len(control) > size:
        raise BackboneError(
            f"{path} has {count} pieces, but config.json gives a vocabulary of {size}. Tokeniser "
            "and model do not belong together."
        )
    tokens = [processor.IdToPiece(i) for i in range(count)]
    scores = [float(processor.GetScore(i)) for i in range(count)]
    types = [_kind(processor, i) for i in range(count)]
    for name in control:
        tokens.append(name)
        scores.append(0.0)
        types.append(Kind.CONTROL)
    for i in range(len(tokens), size):
        tokens.append(f"[PAD{i}]")
        scores.append(UNUSED_SCORE)
        types.append(Kind.UNUSED)
    for index, (name, is_special) in read_added_tokens(folder).items():
        if index >= size:
            continue
        if types[index] in (Kind.UNKNOWN, Kind.CONTROL) and tokens[index] == name:
            continue
        tokens[index], scores[index] = name, UNUSED_SCORE
        types[index] = Kind.CONTROL if is_special else Kind.USER_DEFINED
    roles = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unknown": processor.unk_id()}
    roles |= special or {}
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[token.encode() for token in tokens],
        types=[int(kind) for kind in types],
        scores=scores,
        special={role: index for role, index in roles.items() if index >= 0},
        add_bos=add_bos,
    )


def _kind(processor: Any, index: int) -> Kind:
    if processor.IsUnknown(index):
        return Kind.UNKNOWN
    if processor.IsControl(index):
        return Kind.CONTROL
    if processor.IsUnused(index):
        return Kind.UNUSED
    return Kind.BYTE if processor.IsByte(index) else Kind.NORMAL


def _check_kind(path: Path) -> None:
    """Only BPE by score: llama.cpp's "llama" tokeniser would split a unigram model differently."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise BackboneError(
            f"{path} is not a byte-pair sentencepiece model, so llama.cpp would split text "
            "differently. Convert the model with llama.cpp's own tools and give the GGUF file."
        )
