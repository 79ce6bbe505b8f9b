"""How llama.cpp opens a model, without the work that nobody needs: `src/ggml_opening.cpp`.

    opening.settle(llama)               # after `ggml.preload`; llama: llama.cpp's library, loaded
    with opening.shortened(path, head, tail, size, data):
        ...                             # llama.cpp, called by this thread, opens `path`

From then on llama.cpp's caches are not filled with zeros but begin as fresh pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mse_kernels import ggml

__all__ = ["bytes_given_back", "headers", "settle", "shortened"]

_FUNCTIONS = (
    "gguf_init_from_file", "gguf_init_from_callback", "gguf_get_data_offset", "gguf_free",
    "ggml_free", "ggml_backend_buffer_clear", "ggml_backend_buffer_name",
    "ggml_backend_buffer_get_base", "ggml_backend_buffer_get_size",
)  # fmt: skip


class _Functions(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _FUNCTIONS)


class _Header(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("path", "head", "tail")),
        *((name, ctypes.c_uint64) for name in ("head_size", "tail_size", "size", "data")),
    )


def settle(llama: ctypes.CDLL) -> bool:
    """Tell ours what llama.cpp's own functions are; whether headers can be shortened now.

    Must follow where `ggml.preload` came before llama.cpp: it cannot open a model otherwise.
    """
    lib = ggml.preload()
    if lib is None:
        return False
    # By this handle: by name alone it would be ours.
    found = [
        ctypes.cast(getattr(llama, name), ctypes.c_void_p) if hasattr(llama, name) else None
        for name in _FUNCTIONS
    ]
    lib.mse_opening_use(ctypes.byref(_Functions(*found)))
    return None not in found


@contextmanager
def shortened(path: bytes, head: bytes, tail: bytes, size: int, data: int) -> Iterator[None]:
    """While it lasts, llama.cpp in this thread reads another header than the file's at `path`.

    It is `head`, zeros, and `tail`, `size` bytes in all. The tensors' data begin at byte `data` of
    the file, as they must by this header; otherwise the file's own is read. Where `settle` said so.
    """
    lib: Any = ggml.preload()
    wanted = _Header(path, head, tail, len(head), len(tail), size, data)
    lib.mse_opening_header(ctypes.byref(wanted))
    try:
        yield
    finally:
        lib.mse_opening_header(None)


def headers() -> int:
    """How often a shortened header was read in this process."""
    lib = ggml.preload()
    return 0 if lib is None else int(lib.mse_opening_headers())


def bytes_given_back() -> int:
    """Of caches that llama.cpp would have filled with zeros."""
    lib = ggml.preload()
    return 0 if lib is None else int(lib.mse_opening_bytes())
