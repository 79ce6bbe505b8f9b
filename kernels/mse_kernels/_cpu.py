"""The CPU backend: `libmse_fusion` through ctypes."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import mse_kernels
from mse_kernels.errors import KernelError, UnavailableError
from mse_kernels.inputs import F32, NAMES, Batch, check, not_finite, refuse_lengths
from mse_kernels.weights import FUSION, MIX, PSEUDO, STORAGES, UP, Weights

__all__ = ["CpuAdapter", "isas", "library", "reason"]

ABI_VERSION = 2
BAD_LENGTH, NOT_FINITE = 5, 6


class Dims(ctypes.Structure):
    """mse_dims of abi.h."""

    _fields_ = (
        *((name, c_int32) for name in ("audio_dim", "audio_hidden", "video_dim", "video_hidden")),
        ("mix", c_int32),
        ("width", c_int32),
        ("scale", c_int32 * 3),
        ("n_pseudo", c_int32),
    )


_WEIGHT_NAMES = (
    *(
        f"{part}_LSTM.{name}"
        for part in ("audio", "video")
        for name in (
            *("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"),
            *("linear.weight", "linear.bias"),
        )
    ),
    *("text_guide_mixer.text_mlp.weight", "text_guide_mixer.text_mlp.bias"),
    *(
        f"{FUSION}.scale{m}.{layer}.{kind}"
        for layer in (0, 2)
        for kind in ("weight", "bias")
        for m in (1, 2, 3)
    ),
    *(f"{part}.{kind}" for part in (MIX, UP, PSEUDO) for kind in ("weight", "bias")),
)


class Inputs(ctypes.Structure):
    """mse_inputs of abi.h."""

    _fields_ = (
        ("batch", c_int64),
        *((name, c_void_p) for name in NAMES),
        *((f"{name}_len", c_void_p) for name in NAMES),
        *((f"{name}_steps", c_int64) for name in NAMES),
    )


def _paths() -> list[Path]:
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    # An editable install has two folders on the path: the sources' and the built library's.
    folders = [Path(p) for p in mse_kernels.__path__]
    if override := os.environ.get("MSE_KERNELS_LIBRARY"):
        return [Path(override)]
    return [folder / f"{prefix}mse_fusion{suffix}" for folder in folders]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    paths = _paths()
    found = next((p for p in paths if p.is_file()), None)
    if found is None:
        looked = ", ".join(str(p.parent) for p in paths)
        return None, f"the kernel library was not built (looked in {looked}); run `pip install .`"
    try:
        lib = ctypes.CDLL(str(found))
        version = int(lib.mse_abi_version())
    except (OSError, AttributeError) as error:
        return None, f"{found} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, f"{found} has ABI {version}, this package needs {ABI_VERSION}: reinstall"
    floats, text = c_void_p, c_char_p
    for name, result, args in (
        ("mse_isas", text, []),
        ("mse_isa_usable", c_int32, [text]),
        ("mse_open", c_int32, [POINTER(Dims), c_void_p, c_int32, c_int32, text, c_void_p]),
        ("mse_isa", text, [c_void_p]),
        ("mse_memory", None, [c_void_p, POINTER(c_int64), POINTER(c_int64)]),
        ("mse_forward", c_int32, [c_void_p, POINTER(Inputs), floats, POINTER(c_int64)]),
        ("mse_close", None, [c_void_p]),
        ("mse_activate", c_int32, [text, c_int32, floats, floats, c_int64]),
        (
            "mse_linear",
            c_int32,
            [text, c_int32, floats, floats, c_int32, c_int32, floats, c_int32, floats],
        ),
        ("mse_mean_rows", c_int32, [text, floats, c_int64, c_int32, floats]),
        ("mse_probe_mac", c_int64, [text, c_int64]),
        ("mse_probe_read", c_float, [text, floats, c_int64]),
    ):
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = args
    return lib, None


def library() -> ctypes.CDLL:
    """The loaded library; UnavailableError with the reason where there is none."""
    lib, why = _load()
    if lib is None:
        raise UnavailableError(why or "the kernel library is not there")
    return lib


def reason() -> str | None:
    """Why this backend cannot run, or None."""
    return _load()[1]


def isas() -> tuple[str, ...]:
    """Instruction sets in the library that this processor runs, best first."""
    lib = library()
    names: list[bytes] = lib.mse_isas().split(b",")
    return tuple(n.decode() for n in names if lib.mse_isa_usable(n))


class CpuAdapter:
    """An adapter opened on the CPU; calls on one instance run one after the other.

    `threads` counts the calling one; the same numbers come out for any of them, bit for bit.
    """

    name = "cpu"

    def __init__(self, weights: Weights, threads: int, storage: str, isa: str | None) -> None:
        lib = library()
        if not 1 <= threads <= 64:
            raise KernelError(f"threads is {threads}, expected 1..64")
        weights.check_storage(storage)
        wanted = isa or os.environ.get("MSE_KERNELS_ISA", "")
        if wanted and wanted not in isas():
            raise UnavailableError(f"instruction set {wanted!r}: this machine runs {isas()}")
        dims = Dims(
            *(weights.audio_dim, weights.audio_hidden, weights.video_dim, weights.video_hidden),
            *(weights.mix, weights.n_embd),
            (c_int32 * 3)(*weights.scale),
            weights.n_pseudo,
        )
        pointers = (c_void_p * len(_WEIGHT_NAMES))(
            *(weights.arrays[name].ctypes.data for name in _WEIGHT_NAMES)
        )
        handle = c_void_p()
        code = lib.mse_open(
            byref(dims), pointers, threads, STORAGES.index(storage), wanted.encode(), byref(handle)
        )
        if code != 0:
            raise KernelError(f"the kernel library refused the adapter (code {code})")
        self.n_pseudo, self.n_embd = weights.n_pseudo, weights.n_embd
        self.threads, self.storage = threads, storage
        self._lib, self._handle = lib, handle
        self.isa = str(lib.mse_isa(handle).decode())
        self._dims = (weights.audio_dim, weights.video_dim, weights.n_embd)
        self._finalizer = weakref.finalize(self, lib.mse_close, handle)

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of packed weights, and of scratch memory."""
        packed, scratch = c_int64(), c_int64()
        self._lib.mse_memory(self._open_handle(), byref(packed), byref(scratch))
        return packed.value, scratch.value

    def _open_handle(self) -> c_void_p:
        if not self._finalizer.alive:
            raise KernelError("this adapter is closed")
        return self._handle

    def __call__(
        self, audio: Any, audio_len: Any, video: Any, video_len: Any, text: Any, text_len: Any
    ) -> F32:
        """Pseudo tokens [B, P, D] float32; InputError names what it refuses.

        audio [B, Ta, da], video [B, Tv, dv], text [B, Tt, D] float32; lengths integers [B], of
        which 0 is allowed: the encoder's output is then its linear bias.
        """
        handle = self._open_handle()
        batch = check(self._dims, (audio, audio_len, video, video_len, text, text_len))
        out: F32 = np.empty((batch.audio.shape[0], self.n_pseudo, self.n_embd), np.float32)
        where = (c_int64 * 4)()
        code = self._lib.mse_forward(handle, byref(_inputs(batch)), _at(out), where)
        if code == BAD_LENGTH:
            refuse_lengths(batch)
        if code == NOT_FINITE:
            raise not_finite(NAMES[where[0]], where[1], where[2], where[3])
        if code != 0:
            raise KernelError(f"the kernel library failed (code {code})")
        return out

    def close(self) -> None:
        """Free the weights and end the threads; calling twice is fine."""
        self._finalizer()

    def __enter__(self) -> CpuAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _at(array: np.ndarray[Any, Any]) -> int:
    # `array.ctypes` builds a Python object, whose code is seldom in cache between two calls.
    address: int = array.__array_interface__["data"][0]
    return address


def _inputs(b: Batch) -> Inputs:
    return Inputs(
        b.audio.shape[0],
        *(_at(a) for a in (b.audio, b.video, b.text)),
        *(_at(a) for a in (b.audio_len, b.video_len, b.text_len)),
        *(a.shape[1] for a in (b.audio, b.video, b.text)),
    )
