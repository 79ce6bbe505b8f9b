"""Which of a Q4_0 model's weights llama.cpp repacks, where our product reads that layout.

The output matrix stays as the file has it: labels are scored from a few of its rows (`head`), and
repacking it all, a fifth of a small model, would only make loading longer. Where ours takes the
file's layout (`library.mapped_types`) nothing is repacked for it; files of several types, of which
one is not ours, are left to llama.cpp, which has tile kernels of its own there.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

from mse_runtime.backbone import library
from mse_runtime.backbone.head import Head
from mse_runtime.gguf import Gguf

__all__ = ["REPACKED", "output_stays_mapped", "repacked_q4_0"]

REPACKED = "CPU_REPACK"
"""llama.cpp's name of the buffers of repacked weights."""
_COLUMNS = 8
_LAYER_WEIGHT = re.compile(r"blk\.\d+\.(\w+)\.weight")


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override`."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def repacked_q4_0(lib: Any, gguf: Gguf) -> Any:
    """`llama_model_params.tensor_buft_overrides` for our product; None where llama.cpp chooses.

    With it llama.cpp need not look for another layout for the rest (`use_extra_bufts`). The array
    must live until the model is loaded.
    """
    if not output_stays_mapped(gguf):
        return None
    pattern = rf"^blk\.[0-9]+\.({'|'.join(_names(gguf))})\.weight$"
    return (_Override * 2)(_Override(pattern.encode(), _buffer_type(lib)), _Override(None, None))


def output_stays_mapped(gguf: Gguf) -> bool:
    """Whether the layers' matrices are all in `repacked_q4_0`, and the output matrix is no matter.

    Loads llama.cpp.
    """
    if library.mapped_types() or not _names(gguf) or not Head(gguf).plain:
        return False
    return _buffer_type(library.load()) is not None


def _names(gguf: Gguf) -> list[str]:
    """Names of the layers' matrices; none where one of them cannot be repacked for our product."""
    names = set()
    for info in gguf.tensors.values():
        if (match := _LAYER_WEIGHT.fullmatch(info.name)) and len(info.shape) > 1:
            if info.type != "Q4_0" or len(info.shape) != 2 or info.shape[0] % _COLUMNS:
                return []
            names.add(match[1])
    return sorted(names)


def _buffer_type(lib: Any) -> int | None:
    """The buffer type of repacked weights, from the CPU backend's own list, for our product.

    llama.cpp takes an override without asking whether that type has a layout for the matrix: for
    Q4_0 it has none where it was built without AVX2.
    """
    if library.q4_0_product() == "llama.cpp":
        return None
    try:
        if b"AVX2 = 1" not in lib.llama_print_system_info():
            return None
        device = _function(lib, "ggml_backend_dev_by_type", ctypes.c_int)(0)
        registry = _function(lib, "ggml_backend_dev_backend_reg", ctypes.c_void_p)(device)
        address = _function(
            lib, "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_char_p
        )(registry, b"ggml_backend_dev_get_extra_bufts")
        name_of = _function(lib, "ggml_backend_buft_name", ctypes.c_void_p)
    except AttributeError:  # another llama.cpp
        return None
    name_of.restype = ctypes.c_char_p
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    for kind in iter(kinds):
        if kind is None:
            return None
        if name_of(kind) == REPACKED.encode():
            return int(kind)
    return None


def _function(lib: Any, name: str, *arguments: Any) -> Any:
    """A function of ggml that returns a pointer; libllama is linked against it."""
    found = getattr(lib._lib, name)
    found.restype, found.argtypes = ctypes.c_void_p, list(arguments)
    return found
