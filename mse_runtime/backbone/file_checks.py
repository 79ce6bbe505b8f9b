"""What a GGUF file's header tells before llama.cpp sees it."""

from __future__ import annotations

from mse_runtime import cache, cpu
from mse_runtime.backbone import library
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

__all__ = ["check_file", "may_repack", "repacking_pays"]

_FULLY_ROTATED = ("llama", "qwen", "qwen2")
_CACHE = "vocabularies.json"
_MAX_LAYERS = 512  # llama.cpp's own limit
_FASTER_REPACKED = {"Q4_0", "IQ4_NL", "MXFP4"}  # on x86 without AMX


def check_file(gguf: Gguf) -> None:
    """Refuse files that contradict themselves where llama.cpp would meet it with an assertion.

    An assertion of llama.cpp kills the process. Those checked here were found by damaging good
    files at random; what llama.cpp reports as an error is left to it.
    """
    if why := _contradiction(gguf):
        raise BackboneError(
            f"{gguf.path} contradicts itself: {why}. Export or download the model again."
        )


def _contradiction(gguf: Gguf) -> str:
    n_vocab, width = gguf.n_vocab, gguf.tensors["token_embd.weight"].shape[1]
    tokens = gguf.array_length("tokenizer.ggml.tokens")
    heads, kv_heads, (key_dim, value_dim) = gguf.n_head, gguf.n_head_kv, gguf.head_dim
    rotated = gguf.integer("{arch}.rope.dimension_count", key_dim)
    epsilon = gguf.value("{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    if width != gguf.n_embd:
        return f"its embedding table is {width} wide, its metadata say {gguf.n_embd}"
    if tokens and tokens != n_vocab:
        return f"{tokens} tokens in the vocabulary, {n_vocab} rows in the embedding table"
    if _repeats(gguf):
        return "its vocabulary holds a token twice"
    if not 1 <= gguf.n_layer <= _MAX_LAYERS:
        return f"it has {gguf.n_layer} layers"
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} key/value heads"
    if key_dim != value_dim:
        return f"its keys are {key_dim} wide, its values {value_dim}"
    if not 0 < rotated <= key_dim:
        return f"{rotated} of {key_dim} dimensions of a head are rotated"
    if gguf.arch in _FULLY_ROTATED and rotated != key_dim:
        return f"{rotated} of {key_dim} dimensions are rotated, and {gguf.arch} rotates all"
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        return f"its normalisation epsilon is {epsilon!r}"
    return ""


def _repeats(gguf: Gguf) -> bool:
    """Whether the vocabulary holds a token twice; files that do not are remembered."""
    name = gguf.identity
    if name in cache.read_json(_CACHE):
        return False
    if gguf.has_repeats("tokenizer.ggml.tokens"):
        return True
    if name is not None:
        cache.remember(_CACHE, name, "ok")
    return False


def may_repack(gguf: Gguf) -> bool:
    """Whether llama.cpp could keep some weight in another layout than the file's.

    Quantised matrices are repacked where the CPU has a kernel for it; AMX takes F16 ones too.
    The embedding table never is: its rows are looked up.
    """
    plain = ("F32", "BF16") if cpu.has_amx() else ("F32", "BF16", "F16")
    return any(kind not in plain for kind in _matrices(gguf))


def repacking_pays(gguf: Gguf) -> bool:
    """Whether answers are faster from repacked weights: those that most bytes are of decide.

    On x86 without AMX llama.cpp multiplies K-quants faster from the file's own layout, whatever the
    length of a pass, and has no repacked layout for others; what is not repacked is mapped, which
    takes no time. So does our own product (`library.mapped_types`). Loads llama.cpp.
    """
    sizes, ours = _matrices(gguf), set(library.mapped_types()) if _flat(gguf) else set()
    if sizes.keys() <= ours:
        return False
    if cpu.is_x86() and not cpu.has_amx():
        faster = _FASTER_REPACKED - ours
        return 2 * sum(sizes.get(kind, 0) for kind in faster) > sum(sizes.values())
    return may_repack(gguf)


def _flat(gguf: Gguf) -> bool:
    """Whether no matrix is a stack of experts' ones."""
    return all(len(info.shape) < 3 for info in gguf.tensors.values())


def _matrices(gguf: Gguf) -> dict[str, int]:
    """Bytes of the layers' matrices by type; the output matrix, a small model's half, aside."""
    sizes: dict[str, int] = {}
    for info in gguf.tensors.values():
        if len(info.shape) > 1 and info.name not in ("token_embd.weight", "output.weight"):
            sizes[info.type] = sizes.get(info.type, 0) + info.size
    return sizes
