"""Opening a model: options, the checks before llama.cpp sees the file, and what came of it."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from mse_runtime import cpu
from mse_runtime.backbone import library
from mse_runtime.backbone.excerpt import KEY
from mse_runtime.backbone.file_checks import check_file, may_repack, repacking_pays
from mse_runtime.backbone.head import make_tap
from mse_runtime.backbone.mapped import STEP, CopiedPages
from mse_runtime.backbone.reports import log_errors, log_lines, log_mark, progress_callback
from mse_runtime.backbone.rotary import TABLES, RopeTable, Rounding
from mse_runtime.backbone.vocabulary import Vocabulary, excerpt_for
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import MAPPINGS, Gguf
from mse_runtime.records import dataclass

__all__ = [
    "Context", "Handles", "Options", "copied_pages", "copies_weights", "free_model",
    "load_model", "make_context",
]  # fmt: skip

_KV_TYPES = {"f32": 0, "f16": 1}
_MMAP, _READ = 1, 0  # llama_load_mode
_PLAIN_ROPE = {-1, 0, 2}  # none, norm, neox; the others take several positions for each token
_BUFFER = re.compile(r":\s+(\S+)\s+(model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB")
_LOADING = threading.Lock()
"""Models load in turns: llama.cpp unmaps parts of files at the end (see `CopiedPages`)."""
_REPACKED = "CPU_REPACK model"
"""llama.cpp's name of the buffer of repacked weights."""
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")


@dataclass(frozen=True)
class Options:
    """How a model is opened; `Backbone.open` documents each."""

    n_ctx: int = 512
    n_seq_max: int = 1
    threads: int | None = None
    n_gpu_layers: int = 0
    kv_type: str = "f16"
    low_memory: bool = False
    extra_bufts: bool | None = None
    flash_attention: bool | None = None
    n_outputs_max: int = 32
    tree_width: int = 16
    rope_table: RopeTable = "exact"
    max_batch: int = 1 << 20
    """Positions of one `llama_decode`; `Sequences.shrink` lowers it."""

    @property
    def n_sequences(self) -> int:
        """The caller's, a tree's leaves, and one for rows that fill a pass up."""
        return self.n_seq_max + self.tree_width + 1

    def checked(self) -> Options:
        """The same with defaults filled in and `n_ctx` rounded up to llama.cpp's step of 256."""
        _check_range("n_ctx", self.n_ctx, 1, 1 << 20)
        _check_range("n_seq_max", self.n_seq_max, 1, 255)
        _check_range("tree_width", self.tree_width, 0, 255 - self.n_seq_max)
        _check_range("n_gpu_layers", self.n_gpu_layers, -1, 1 << 16)
        n_ctx = -(-self.n_ctx // 256) * 256
        _check_range("n_outputs_max", self.n_outputs_max, 1, n_ctx)
        threads = cpu.physical_cores() if self.threads is None else self.threads
        _check_range("threads", threads, 1, 512)
        if self.kv_type not in _KV_TYPES:
            raise BackboneError(f"kv_type must be 'f16' or 'f32', not {self.kv_type!r}.")
        if self.rope_table not in TABLES:
            raise BackboneError(f"rope_table must be 'exact' or 'bf16', not {self.rope_table!r}.")
        # llama.cpp sizes its output buffer for one output of each sequence, and aborts otherwise.
        outputs = min(n_ctx, max(self.n_outputs_max, self.n_sequences))
        return replace(self, n_ctx=n_ctx, threads=threads, n_outputs_max=outputs)


@dataclass(frozen=True)
class Context:
    """A `llama_context`, and what its callback calls: that must live as long.

    `tap` takes the last hidden states (`head`); None on a GPU, where the output matrix is cheap
    and the callback would cut its graphs up.
    """

    pointer: Any
    rounding: Rounding | None
    tap: Any


@dataclass(frozen=True)
class Handles:
    """The C objects behind a Backbone, and what llama.cpp reported about them."""

    lib: Any
    model: Any
    context: Context
    vocabulary: Vocabulary
    info: dict[str, Any]


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BackboneError(f"{name} must be a whole number in {low} .. {high}, not {value!r}.")


def load_model(
    gguf: Gguf,
    options: Options,
    progress: Callable[[float], None] | None,
    texts: Sequence[str] = (),
) -> Handles:
    """Load `gguf` and make a context for it; everything is freed again if a step fails.

    texts: all that will be tokenised soon; of a large vocabulary only what they need is loaded.
    Raises BackboneError with llama.cpp's own last words.
    """
    check_file(gguf)
    lib = library.load()
    extra, probed, warnings = _extra_bufts(gguf, options)
    if isinstance(texts, str):
        raise BackboneError("texts must be a sequence of texts, not one. Put it in a list.")
    part = excerpt_for(lib, gguf, texts)
    mark = log_mark()
    try:
        model = _load_weights(lib, gguf, options, extra, part is None, progress, mark)
        try:
            _check_model(lib, model, gguf)
            context = make_context(lib, model, options)
            try:
                # Before an excerpt is compared: that fills the log with lines of its own.
                info = _describe(lib, gguf, options, extra, warnings, log_lines(mark))
                info |= {"mapped": not copies_weights(gguf, extra), "probe": probed}
                vocabulary = Vocabulary(lib, gguf, model, part)
                vocabulary.remember(texts)
            except BaseException:
                lib.llama_free(context.pointer)
                raise
        except BaseException:
            free_model(lib, model)
            raise
    except BaseException:
        if part is not None:
            part.close()
        raise
    return Handles(lib, model, context, vocabulary, info)


def _extra_bufts(gguf: Gguf, options: Options) -> tuple[bool, dict[str, Any], list[str]]:
    """Whether weights may be repacked, what the probe said, and what the user should know."""
    if options.low_memory:
        return False, {"outcome": "not asked: low_memory"}, []
    if options.extra_bufts is not None:
        return options.extra_bufts, {"outcome": "not asked: extra_bufts was given"}, []
    if not repacking_pays(gguf):
        return False, {"outcome": "not asked: repacking these weights would not pay"}, []
    from mse_runtime import probe

    found = probe.fast_path()
    told = {
        "outcome": found.outcome,
        "seconds": round(found.seconds, 2),
        "remembered": found.remembered,
    }
    return found.extra_bufts, told, [found.warning] if found.warning else []


def copies_weights(gguf: Gguf, extra_bufts: bool) -> bool:
    """Whether the weights are a copy in memory, instead of the mapped file itself."""
    return extra_bufts and may_repack(gguf)


def copied_pages(gguf: Gguf, extra_bufts: bool, n_gpu_layers: int) -> CopiedPages | None:
    """For a copy that is made from the mapped file: what is not copied needs no memory then."""
    if n_gpu_layers or not copies_weights(gguf, extra_bufts):
        return None
    return CopiedPages.of(gguf.path)


def _load_weights(
    lib: Any,
    gguf: Gguf,
    options: Options,
    extra: bool,
    vocabulary: bool,
    progress: Callable[[float], None] | None,
    mark: int,
) -> Any:
    params = lib.llama_model_default_params()
    if not vocabulary:
        none = (lib.llama_model_kv_override * 3)()  # the last one, without a key, ends them
        none[0].key, none[0].tag = f"{KEY}model".encode(), lib.LLAMA_KV_OVERRIDE_TYPE_STR
        none[0].value.val_str = b"no_vocab"
        none[1].key, none[1].tag = (
            f"{gguf.arch}.vocab_size".encode(),
            lib.LLAMA_KV_OVERRIDE_TYPE_INT,
        )
        none[1].value.val_i64 = gguf.n_vocab
        params.kv_overrides = none
    params.n_gpu_layers = options.n_gpu_layers
    params.use_extra_bufts = extra
    copied = copied_pages(gguf, extra, options.n_gpu_layers)
    params.load_mode = _READ if copies_weights(gguf, extra) and copied is None else _MMAP
    no_devices = (ctypes.c_void_p * 1)(None)
    if options.n_gpu_layers == 0:  # an empty list: no GPU context (some 300 MB) is made
        params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    raised: list[BaseException] = []

    def report(fraction: float, _user: Any) -> bool:
        try:
            if copied is not None:
                copied.give_back()
            if progress is not None:
                progress(float(fraction))
        except BaseException as error:  # carried past the C frames and raised below
            raised.append(error)
            return False
        return True

    step = STEP / max(gguf.size, STEP)
    callback, user_data, _alive = progress_callback(lib, report, step)
    params.progress_callback, params.progress_callback_user_data = callback, user_data
    if progress is not None:
        progress(0.0)  # llama.cpp's own first call is after the file is mapped, and read
    # With a vocabulary of our own llama.cpp need not read the file's.
    file = nullcontext(gguf.path) if vocabulary else library.without_arrays(gguf, KEY)
    with _LOADING, file as path:
        model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if raised:
        if model:
            free_model(lib, model)
        raise raised[0]
    if not model:
        raise BackboneError(
            f"llama.cpp cannot load {gguf.path}: {log_errors(mark) or 'no reason given'}. "
            "If it is short of memory try --low-memory; if the model is unknown to it, use llama, "
            "qwen, qwen2 or chatglm."
        )
    return model


def free_model(lib: Any, model: Any) -> None:
    """Free a model and unmap its file."""
    with MAPPINGS:
        lib.llama_model_free(model)


def _check_model(lib: Any, model: Any, gguf: Gguf) -> None:
    """Refuse what the embedding path of llama.cpp has other rules for."""
    why = ""
    if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
        why = "it has an encoder; only decoder-only models answer after a prompt"
    elif lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model):
        why = "it keeps a recurrent state, which cannot be truncated or shared between sequences"
    elif lib.llama_model_rope_type(model) not in _PLAIN_ROPE:
        why = "its positions are multi-dimensional"
    elif lib.llama_model_n_embd_inp(model) != gguf.n_embd:
        why = "its input rows are wider than its embeddings"
    elif lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)) != gguf.n_vocab:
        why = "its vocabulary and its embedding table differ in size"
    if why:
        raise BackboneError(
            f"{gguf.path} ({gguf.arch}) cannot be used here: {why}. Use a plain decoder such as "
            "llama, qwen, qwen2 or chatglm."
        )


def make_context(lib: Any, model: Any, options: Options) -> Context:
    """A context for `options`; BackboneError where memory is short."""
    rounding = Rounding(lib) if options.rope_table == "bf16" else None
    tap = None
    if rounding is None and options.n_gpu_layers == 0:
        tap = make_tap(lib, options.n_outputs_max, lib.llama_model_n_embd(model))
    mark = log_mark()
    params = lib.llama_context_default_params()
    params.n_ctx = options.n_ctx
    params.n_batch = min(options.n_ctx, options.max_batch)
    params.n_ubatch = min(params.n_batch, 512)
    params.n_seq_max = options.n_sequences
    params.n_outputs_max = options.n_outputs_max
    params.n_threads = params.n_threads_batch = options.threads
    params.type_k = params.type_v = _KV_TYPES[options.kv_type]
    flash = options.flash_attention
    if flash is None and options.kv_type == "f32":
        flash = False  # it would round the keys and values to float16 again
    params.flash_attn_type = -1 if flash is None else int(flash)
    params.kv_unified = True  # sequences share cells: copying a prefix costs nothing
    params.offload_kqv = params.op_offload = options.n_gpu_layers != 0
    params.no_perf = True
    if rounding is not None:
        params.cb_eval = rounding.callback
    elif tap is not None:
        params.cb_eval = ctypes.cast(tap.callback, lib.ggml_backend_sched_eval_callback)
        params.cb_eval_user_data = tap.user_data
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise BackboneError(
            f"llama.cpp cannot make a context of {options.n_ctx} positions: "
            f"{log_errors(mark) or 'no reason given'}. Try a smaller n_ctx, fewer GPU "
            "layers or --low-memory."
        )
    return Context(context, rounding, tap)


def _describe(
    lib: Any, gguf: Gguf, options: Options, extra: bool, warnings: list[str], lines: list[str]
) -> dict[str, Any]:
    buffers: dict[str, float] = {}
    offloaded = 0
    for line in lines:
        if match := _BUFFER.search(line):
            key = f"{match[1]} {match[2]}"
            buffers[key] = round(buffers.get(key, 0.0) + float(match[3]), 2)
        if match := _OFFLOADED.search(line):
            offloaded = int(match[1])
    repacked = _REPACKED in buffers
    gpus = [d for d in library.devices() if d.kind in ("gpu", "igpu")]
    if options.n_gpu_layers and not offloaded:
        reason = "llama.cpp was built without GPU support" if not gpus else "none was taken"
        warnings.append(
            f"no layer runs on a GPU although {options.n_gpu_layers} were asked: {reason}"
        )
    return {
        "llama_cpp": lib.llama_version().decode() if hasattr(lib, "llama_version") else "",
        "build": library.build_id(),
        "system": lib.llama_print_system_info().decode(errors="replace").strip(),
        "device": gpus[0].description if gpus and offloaded else "cpu",
        "offloaded_layers": offloaded,
        "threads": options.threads,
        "extra_bufts": extra,
        "repacked": repacked,
        "product": _product(gguf, extra, offloaded),
        "attention": _by(library.attention() if offloaded < gguf.n_layer else None),
        "buffers_mib": buffers,
        "warnings": warnings,
    }


def _product(gguf: Gguf, extra: bool, offloaded: int) -> str:
    """Whose product multiplies the weights on the CPU."""
    types = {info.type for name, info in gguf.tensors.items() if name != "token_embd.weight"}
    ours = not extra and offloaded <= gguf.n_layer and types & set(library.mapped_types())
    return _by(library.kernel() if ours else None)


def _by(kernel: str | None) -> str:
    return f"mse_kernels, {kernel}" if kernel else "llama.cpp"
