"""llama.cpp as a process has loaded it: functions, tensors, and small graphs to compare."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Graph", "function", "graph", "knows_tensors"]

_libraries: dict[tuple[Path, str], Any] = {}


class _Tensor(ctypes.Structure):
    """The beginning of `ggml_tensor` (`src/ggml_tensor.h`)."""

    _fields_ = (
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_size_t * 4), ("op", ctypes.c_int32),
        ("parameters", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("source", ctypes.c_void_p * 10), ("view_source", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t), ("data", ctypes.c_void_p),
    )  # fmt: skip


class _InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)
    )  # fmt: skip


def function(folder: Path, symbol: str) -> Any:
    """The address of llama.cpp's own function, as loaded from `folder`; None without one."""
    lib = _loaded(folder, "cpu")
    try:
        return lib and ctypes.cast(getattr(lib, symbol), ctypes.c_void_p)
    except AttributeError:
        return None


@dataclass(frozen=True)
class Graph:
    """Tensors in a ggml context."""

    base: Any
    cpu: Any
    context: Any

    def tensor(self, kind: int, *sizes: int) -> int:
        """A new one of a ggml type; its address."""
        sizes = (*sizes, *[1] * (4 - len(sizes)))
        return int(self.base.ggml_new_tensor_4d(self.context, kind, *sizes))

    def fill(self, tensor: int, values: NDArray[Any]) -> None:
        """values: as many bytes as the tensor has, at most."""
        ctypes.memmove(self.base.ggml_get_data(tensor), values.ctypes.data, values.nbytes)

    def compute(
        self, result: int, shape: tuple[int, ...], threads: int = 1
    ) -> NDArray[np.float32] | None:
        """The values of a tensor of floats; None where they cannot be had."""
        made = self.base.ggml_new_graph(self.context)
        self.base.ggml_build_forward_expand(made, result)
        if self.cpu.ggml_graph_compute_with_ctx(self.context, made, threads):
            return None
        out = np.empty(shape, np.float32)
        ctypes.memmove(out.ctypes.data, self.base.ggml_get_data(result), out.nbytes)
        return out


@contextmanager
def graph(folder: Path, memory: int = 1 << 20) -> Iterator[Graph | None]:
    """An empty one with room for so many bytes; None where this llama.cpp has not the functions."""
    base, cpu = _functions(folder)
    context = base and base.ggml_init(_InitParams(memory, None, False))
    if not context:
        yield None
        return
    try:
        yield Graph(base, cpu, context)
    finally:
        base.ggml_free(context)


def knows_tensors(folder: Path) -> bool:
    """Whether llama.cpp's tensors are laid out as `src/ggml_tensor.h` has it."""
    with graph(folder) as g:
        if g is None:
            return False
        a, b = g.tensor(0, 32, 48), g.tensor(0, 32, 5, 3)
        b = g.base.ggml_permute(g.context, b, 0, 2, 1, 3)
        result = g.base.ggml_soft_max_ext(g.context, a, None, 0.375, 0.0)
        product = g.base.ggml_mul_mat(g.context, a, a)
        at, view, scaled, two = (_Tensor.from_address(x) for x in (a, b, result, product))
        parameters = np.frombuffer(bytes(scaled.parameters), np.float32)
        return (
            at.type == 0
            and [*view.size] == [32, 3, 5, 1]
            and [*view.stride] == [4, 4 * 32 * 5, 4 * 32, 4 * 32 * 15]
            and [*two.source] == [a, a, *[None] * 8]
            and parameters[:2].tolist() == [0.375, 0.0]
            and at.data == g.base.ggml_get_data(a)
            and view.data == g.base.ggml_get_data(b)
            and two.data == g.base.ggml_get_data(product)
        )  # fmt: skip


def _loaded(folder: Path, name: str) -> Any:
    """ggml's library of that name, as llama.cpp has loaded it from `folder`; None without one."""
    if (folder, name) not in _libraries:
        for path in sorted(folder.glob(f"libggml-{name}*.so*")):
            try:
                lib = ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
            except OSError:  # the same under another name
                continue
            _libraries[folder, name] = lib
            break
    return _libraries.get((folder, name))


def _functions(folder: Path) -> tuple[Any, Any]:
    """ggml's libraries with the functions used here declared; (None, None) where one is missing."""
    base, cpu = _loaded(folder, "base"), _loaded(folder, "cpu")
    pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    wanted = (
        (base, "ggml_init", pointer, [_InitParams]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, *[whole] * 4]),
        (base, "ggml_permute", pointer, [pointer] * 2 + [ctypes.c_int] * 4),
        (base, "ggml_mul_mat", pointer, [pointer] * 3),
        (base, "ggml_soft_max_ext", pointer, [pointer] * 3 + [real] * 2),
        (base, "ggml_flash_attn_ext", pointer, [pointer] * 5 + [real] * 3),
        (base, "ggml_get_data", pointer, [pointer]),
        (base, "ggml_new_graph", pointer, [pointer]),
        (base, "ggml_build_forward_expand", None, [pointer] * 2),
        (cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    )
    try:
        for library, name, result, arguments in wanted:
            made = getattr(library, name)
            made.restype, made.argtypes = result, arguments
    except AttributeError:
        return None, None
    return base, cpu
