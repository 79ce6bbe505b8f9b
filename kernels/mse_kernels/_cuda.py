"""The CUDA backend: three launches of `fusion.cu` per call, as a graph for a shape that repeats.

Everything here but the device itself is also run by the tests on a host emulation of the device
(kernels/checks), since it needs nothing of CUDA.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from ctypes import c_int32, c_uint64
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mse_kernels.errors import KernelError, UnavailableError, WeightsError
from mse_kernels.inputs import F32, NAMES, Batch, check, not_finite, refuse_lengths
from mse_kernels.weights import FUSION, MIX, PSEUDO, UP, Weights

if TYPE_CHECKING:
    from mse_kernels._driver import Graph

__all__ = ["CudaAdapter", "Device", "reason"]

MAX_HIDDEN = 256  # one thread per gate of a unit, 1024 threads per block
MAX_BATCH = 64  # samples per launch, 128 blocks of recurrences; larger batches are cut
KEPT_SHAPES = 4
TILE = 64  # kTile of fusion.cu
PROJECT_SHARED = 2 * 16 * (TILE + 4) * 4


class Modality(ctypes.Structure):
    """struct Modality of fusion.cu."""

    _fields_ = (
        *((n, c_uint64) for n in ("x", "length", "w_ih", "w_hh", "bias", "linear", "linear_bias")),
        *((n, c_uint64) for n in ("gates", "hidden")),
        *((n, c_int32) for n in ("dim", "H", "T")),
    )


class Fusion(ctypes.Structure):
    """struct Fusion of fusion.cu."""

    _fields_ = (
        *((n, c_uint64) for n in ("text", "text_length", "know", "first", "second", "up")),
        *((n, c_uint64) for n in ("know_bias", "first_bias", "second_bias", "up_bias")),
        *((n, c_uint64) for n in ("slope", "shift", "mean", "mixed", "expert", "fused", "out")),
        ("barrier", c_uint64),
        *((n, c_int32) for n in ("B", "Tt", "D", "mix", "S", "P")),
    )


# The fields that hold weights, in the order of the structures.
MODALITY_WEIGHTS = ("w_ih", "w_hh", "bias", "linear", "linear_bias")
FUSION_WEIGHTS = (
    *("know", "first", "second", "up"),
    *("know_bias", "first_bias", "second_bias", "up_bias"),
    *("slope", "shift"),
)


class Device(Protocol):
    """What a device offers; `_driver.CudaDevice` is the real one."""

    name: str
    sm_count: int

    def active(self) -> AbstractContextManager[None]: ...
    def alloc(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def upload(self, address: int, array: npt.NDArray[Any]) -> None: ...
    def staging(self, nbytes: int) -> npt.NDArray[np.uint8]: ...
    def unstage(self, staged: npt.NDArray[np.uint8]) -> None: ...
    def copy_in(self, address: int, staged: npt.NDArray[np.uint8]) -> None: ...
    def copy_out(self, staged: npt.NDArray[np.uint8], address: int) -> None: ...
    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        args: Sequence[Any],
        cooperative: bool = False,
    ) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, work: Callable[[], None]) -> Graph | None: ...
    def close(self) -> None: ...


@cache
def reason() -> str | None:
    """Why this backend cannot run, or None. Asks the driver once."""
    from mse_kernels._driver import CudaDevice

    try:
        CudaDevice().close()
    except (KernelError, OSError, AttributeError) as error:
        return str(error)
    return None


def rounded(array: npt.NDArray[Any], storage: str) -> npt.NDArray[Any]:
    """`array` in the bits of `storage`: float32, float16, or bfloat16 as uint16 (ties to even)."""
    exact = np.ascontiguousarray(array, np.float32)
    if storage == "f16":
        return exact.astype(np.float16)
    if storage == "bf16":
        bits = exact.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return exact


def widened(array: npt.NDArray[Any], storage: str) -> F32:
    """The values of `rounded(array, storage)` as float32."""
    bits = rounded(array, storage)
    if storage == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def packed(weights: Weights, storage: str) -> dict[str, npt.NDArray[Any]]:
    """Weights as fusion.cu wants them: gates of a unit beside each other, experts folded."""
    w = weights.arrays
    out: dict[str, npt.NDArray[Any]] = {}
    for name, hidden in (("audio", weights.audio_hidden), ("video", weights.video_hidden)):
        order = np.arange(4 * hidden).reshape(4, hidden).T.ravel()  # row 4 u + g <- g H + u
        rnn = f"{name}_LSTM.rnn"
        out[f"{name}.w_ih"] = widened(w[f"{rnn}.weight_ih_l0"][order], storage)
        out[f"{name}.w_hh"] = widened(w[f"{rnn}.weight_hh_l0"][order], storage)
        out[f"{name}.bias"] = (w[f"{rnn}.bias_ih_l0"] + w[f"{rnn}.bias_hh_l0"])[order]
        out[f"{name}.linear"] = widened(w[f"{name}_LSTM.linear.weight"], storage)
        out[f"{name}.linear_bias"] = w[f"{name}_LSTM.linear.bias"]
    factors = w[f"{MIX}.weight"].reshape(3)
    scales = [f"{FUSION}.scale{m}" for m in (1, 2, 3)]
    second = np.concatenate(
        [f * w[f"{s}.2.weight"] for f, s in zip(factors, scales, strict=True)], axis=1
    )
    bias = w[f"{MIX}.bias"].astype(np.float64) + sum(
        np.float64(f) * w[f"{s}.2.bias"] for f, s in zip(factors, scales, strict=True)
    )
    out["know"] = rounded(w["text_guide_mixer.text_mlp.weight"], storage)
    out["first"] = rounded(np.concatenate([w[f"{s}.0.weight"] for s in scales]), storage)
    out["second"] = rounded(second, storage)
    out["up"] = rounded(w[f"{UP}.weight"], storage)
    out["know_bias"] = w["text_guide_mixer.text_mlp.bias"]
    out["first_bias"] = np.concatenate([w[f"{s}.0.bias"] for s in scales])
    out["second_bias"] = bias.astype(np.float32)
    out["up_bias"] = w[f"{UP}.bias"]
    out["slope"], out["shift"] = w[f"{PSEUDO}.weight"].ravel(), w[f"{PSEUDO}.bias"]
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


class _Plan:
    """Buffers and work of one shape (B, Ta, Tv, Tt).

    The first call queues its launches one by one, which also shows whether they run at all; a shape
    that comes again is recorded as a graph. Many never come again.
    """

    def __init__(self, owner: CudaAdapter, shape: tuple[int, int, int, int]) -> None:
        self._device = owner.device
        self._addresses: list[int] = []
        self._staged: list[npt.NDArray[np.uint8]] = []
        self._calls = 0
        self._graph: Graph | None = None
        try:
            self._build(owner, shape)
        except BaseException:  # out of memory: nothing of this shape stays behind
            self.close()
            raise

    def _build(self, owner: CudaAdapter, shape: tuple[int, int, int, int]) -> None:
        device = self._device
        w, (b, *steps) = owner.weights, shape
        widths = (w.audio_dim, w.video_dim, w.n_embd)
        # All inputs in one staging buffer: one copy. Lengths first, each part aligned.
        sizes = [8 * b] * 3 + [4 * b * t * d for t, d in zip(steps, widths, strict=True)]
        starts, total = [], 0
        for n in sizes:
            starts.append(total)
            total += (n + 255) // 256 * 256
        experts = sum(w.scale)

        def staging(nbytes: int) -> npt.NDArray[np.uint8]:
            self._staged.append(device.staging(nbytes))
            return self._staged[-1]

        def room(*floats: int) -> int:
            address = device.alloc(4 * int(np.prod(floats)))
            self._addresses.append(address)
            return address

        base = room(total // 4)
        self._in = staging(total)
        self._out = staging(4 * b * w.n_pseudo * w.n_embd)
        self._views = [self._in[s : s + n] for s, n in zip(starts, sizes, strict=True)]
        modalities = []
        for i, hidden in enumerate((w.audio_hidden, w.video_hidden)):
            own = (owner.addresses[f"{NAMES[i]}.{n}"] for n in MODALITY_WEIGHTS)
            modalities.append(
                Modality(
                    *(base + starts[3 + i], base + starts[i], *own),
                    *(room(b, steps[i], 4 * hidden), room(b, hidden)),
                    *(widths[i], hidden, steps[i]),
                )
            )
        out, barrier = room(b, w.n_pseudo, w.n_embd), room(1)
        fusion = Fusion(
            *(base + starts[5], base + starts[2]),
            *(owner.addresses[n] for n in FUSION_WEIGHTS),
            *(room(b, w.n_embd), room(b, w.mix), room(b, experts), room(b, w.mix), out, barrier),
            *(b, steps[2], w.n_embd, w.mix, experts, w.n_pseudo),
        )
        hidden = max(w.audio_hidden, w.video_hidden)
        tiles = max(-(-m.T // TILE) * -(-4 * m.H // TILE) for m in modalities)
        known = {w.audio_hidden, w.video_hidden} <= {16, 32, 64}
        threads = (4 * hidden + 31) // 32 * 32

        def work() -> None:
            device.copy_in(base, self._in)
            device.launch(
                *("mse_project", (max(tiles, 1), b, 2), 256, PROJECT_SHARED),
                (*modalities, c_uint64(barrier)),
            )
            device.launch(
                *("mse_lstm" if known else "mse_lstm_any", (b, 2, 1), threads, 8 * hidden),
                modalities,
            )
            # One block per multiprocessor is always resident, which the grid barrier relies on.
            device.launch(
                *(f"mse_fuse_{owner.storage}", (device.sm_count, 1, 1), 256, 0),
                (*modalities, fusion),
                cooperative=True,
            )
            device.copy_out(self._out, out)

        self._work = work

    def run(self, batch: Batch, out: F32) -> None:
        order = (batch.audio_len, batch.video_len, batch.text_len, *batch[::2])
        for view, array in zip(self._views, order, strict=True):
            view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._calls += 1
        if self._calls == 2:
            self._graph = self._device.record(self._work)
        if self._graph is None:
            self._work()
        else:
            self._graph.launch()
        self._device.synchronize()
        out.reshape(-1)[:] = self._out.view(np.float32)

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        for address in self._addresses:
            self._device.free(address)
        for staged in self._staged:
            self._device.unstage(staged)


class CudaAdapter:
    """An adapter opened on the first NVIDIA GPU; calls on one instance run one after the other."""

    name = "cuda"

    def __init__(self, weights: Weights, storage: str, device: Device | None = None) -> None:
        weights.check_storage(storage)
        if max(weights.audio_hidden, weights.video_hidden) > MAX_HIDDEN:
            raise WeightsError(f"the CUDA kernels take an LSTM hidden width up to {MAX_HIDDEN}")
        if device is None:
            from mse_kernels._driver import CudaDevice

            if (why := reason()) is not None:
                raise UnavailableError(why)
            device = CudaDevice()
        self.device, self.weights, self.storage = device, weights, storage
        self.isa = device.name
        self.n_pseudo, self.n_embd = weights.n_pseudo, weights.n_embd
        self.addresses: dict[str, int] = {}
        self._plans: OrderedDict[tuple[int, int, int, int], _Plan] = OrderedDict()
        self._busy, self._open = Lock(), True
        try:
            with device.active():
                for name, array in packed(weights, storage).items():
                    self.addresses[name] = device.alloc(array.nbytes)
                    device.upload(self.addresses[name], array)
        except BaseException:
            self.close()
            raise

    def __call__(
        self, audio: Any, audio_len: Any, video: Any, video_len: Any, text: Any, text_len: Any
    ) -> F32:
        """Pseudo tokens [B, P, D] float32; the same inputs and errors as the CPU backend."""
        if not self._open:
            raise KernelError("this adapter is closed")
        w = self.weights
        dims = (w.audio_dim, w.video_dim, w.n_embd)
        batch = check(dims, (audio, audio_len, video, video_len, text, text_len))
        refuse_lengths(batch)
        _refuse_values(batch)
        n = batch.audio.shape[0]
        out: F32 = np.empty((n, self.n_pseudo, self.n_embd), np.float32)
        with self._busy, self.device.active():
            for at in range(0, n, MAX_BATCH):
                part = batch.part(at, at + MAX_BATCH)
                self._plan(part).run(part, out[at : at + MAX_BATCH])
        return out

    def _plan(self, batch: Batch) -> _Plan:
        rows = (batch.audio, batch.video, batch.text)
        shape = (rows[0].shape[0], *(r.shape[1] for r in rows))
        plan = self._plans.pop(shape, None) or _Plan(self, shape)
        self._plans[shape] = plan
        while len(self._plans) > KEPT_SHAPES:
            self._plans.popitem(last=False)[1].close()
        return plan

    def close(self) -> None:
        """Free the weights and buffers; calling twice is fine."""
        if not self._open:
            return
        self._open = False
        try:
            with self.device.active():
                for plan in self._plans.values():
                    plan.close()
                for address in self.addresses.values():
                    self.device.free(address)
        finally:  # after an error on the GPU every call fails; the context must go back anyway
            self._plans.clear()
            self.device.close()

    def __enter__(self) -> CudaAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_values(batch: Batch) -> None:
    for i, name in enumerate(NAMES):
        rows, lengths = batch[2 * i], batch[2 * i + 1]
        for b, n in enumerate(lengths):
            if not np.isfinite(rows[b, :n]).all():
                t, d = np.argwhere(~np.isfinite(rows[b, :n]))[0]
                raise not_finite(name, b, int(t), int(d))
