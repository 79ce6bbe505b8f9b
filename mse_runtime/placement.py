"""The memory plan: what goes where, before anything is loaded, and what was measured afterwards.

Sizes come from the file's own tensor table, never from nominal bits. The plan is for the peak of
resident memory (RSS) of this process, with one that reads clips beside it, and for the GPU's
memory; both are meant to be within 10 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mse_runtime import memory
from mse_runtime.errors import BackboneError, DeviceError
from mse_runtime.gguf import Gguf
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from mse_runtime.backbone import Backbone

__all__ = [
    "Item",
    "Plan",
    "check_gpu",
    "free_vram",
    "gpu_problem",
    "open_planned",
    "plan",
]

MB = 10**6
LIBRARIES = 26 * MB
"""Libraries that are loaded later, their tables and thread stacks (bench/memory.py, tiny)."""
GPU_MARGIN = 512 * MB
"""Kept free on the GPU: its context, library workspaces, the desktop. An allowance, no measure."""
_UBATCH = 512
_LAYER = re.compile(r"blk\.(\d+)\.")
_KV_BYTES = {"f16": 2, "f32": 4}


@dataclass(frozen=True)
class Item:
    """One consumer of memory, in bytes."""

    name: str
    ram: int = 0
    vram: int = 0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Where a model's memory goes. `n_gpu_layers` counts the output as the last layer."""

    items: tuple[Item, ...]
    n_gpu_layers: int
    n_layers: int
    free_vram: int
    reclaimable: int
    """Part of the RAM that is the mapped file: the kernel may drop it under pressure."""

    @property
    def ram(self) -> int:
        """Planned peak of resident memory, in bytes."""
        return sum(item.ram for item in self.items)

    @property
    def vram(self) -> int:
        return sum(item.vram for item in self.items)

    def rows(
        self,
        measured_rss_mb: float | None = None,
        measured_vram_mb: float | None = None,
        buffers_mib: Mapping[str, float] | None = None,
    ) -> list[tuple[str, ...]]:
        """The plan as a table of strings, head first; sizes in MB (10^6 bytes).

        With `buffers_mib` (`Backbone.info`), a column holds what llama.cpp took for each part.
        """
        table: list[tuple[str, ...]] = [("part", "RAM MB", "VRAM MB", "note")]
        table += [
            (item.name, _mb(item.ram), _mb(item.vram), item.note)
            for item in self.items
            if item.ram or item.vram
        ]
        table.append(("planned", _mb(self.ram), _mb(self.vram), self.summary))
        if measured_rss_mb is not None:
            off = 100 * (self.ram / MB / measured_rss_mb - 1) if measured_rss_mb else 0.0
            vram = "" if measured_vram_mb is None else f"{measured_vram_mb:.0f}"
            table.append(("measured", f"{measured_rss_mb:.0f}", vram, f"plan is {off:+.0f} % off"))
        if buffers_mib is None:
            return table
        took = [_taken(row[0], buffers_mib) for row in table]
        return [(*row[:-1], extra, row[-1]) for row, extra in zip(table, took, strict=True)]

    @property
    def summary(self) -> str:
        """One sentence about the placement."""
        if self.n_gpu_layers:
            return f"{self.n_gpu_layers} of {self.n_layers} layers on the GPU"
        if self.free_vram:
            return f"no layer fits in {self.free_vram // MB} MB of free VRAM: CPU"
        return "CPU"

    def check_ram(self, available: int | None = None) -> None:
        """Raise DeviceError where the RAM that cannot be reclaimed exceeds what is available.

        available: bytes; default what `memory.available` finds.
        """
        room = memory.available() if available is None else available
        present = next((item.ram for item in self.items if item.name == "program"), 0)
        wanted = self.ram - self.reclaimable - present  # what is there already is not available
        if room and wanted > room:
            parts = sorted(self.items, key=lambda item: -item.ram)
            shares = [f"{p.name} {p.ram // MB}" for p in parts if p.name != "program"][:3]
            raise DeviceError(
                f"The model needs {wanted // MB} MB of memory ({', '.join(shares)}), "
                f"{room // MB} MB are available. "
                "Close other programs, use --low-memory, or a smaller or more quantised model."
            )


def plan(
    gguf: Gguf,
    *,
    n_ctx: int = 512,
    n_seq_max: int = 1,
    kv_type: str = "f16",
    low_memory: bool = False,
    extra_bufts: bool = True,
    n_gpu_layers: int | None = None,
    free_vram: int = 0,
    adapter: int = 0,
    features: int = 0,
    n_outputs_max: int = 32,
    tree_width: int = 16,
    positions: int | None = None,
    program: int | None = None,
) -> Plan:
    """Plan the memory of one model with these `Backbone.open` options.

    n_gpu_layers: None takes as many as fit in `free_vram` bytes; -1 means all. adapter, features:
    bytes for these. positions: the longest batch that will really be run, if known (scratch memory
    behind it is reserved but never touched). program: bytes of the process before; default what
    it has now. Loads llama.cpp where weights are copied: what it copies depends on its build.
    """
    program = memory.measured().rss if program is None else program
    sizes = _Sizes(gguf, -(-n_ctx // 256) * 256, _KV_BYTES[kv_type], n_outputs_max)
    count = sizes.n_layer + 1
    if n_gpu_layers is None:
        chosen = next((k for k in range(count, 0, -1) if sizes.vram(k) <= free_vram), 0)
    else:
        chosen = count if n_gpu_layers < 0 else min(n_gpu_layers, count)
    from mse_runtime.backbone.loading import copied_pages, copies_weights

    repacks = extra_bufts and not low_memory
    mapped = not copies_weights(gguf, repacks)
    on_gpu = sizes.layers(chosen)
    vocab = gguf.n_vocab
    used = min(1.0, (positions or sizes.n_ctx) / min(sizes.n_ctx, _UBATCH))
    output_rows = max(n_outputs_max, n_seq_max + tree_width + 1)
    file_part = sum(info.size for info in gguf.tensors.values())
    weights_ram = file_part if mapped else file_part - sum(sizes.weights[i] for i in on_gpu)
    if not mapped and sizes.tied and sizes.n_layer in on_gpu:
        weights_ram += sizes.embedding  # the table itself stays for the rows
    later = (
        Item(
            f"KV cache ({kv_type}, {sizes.n_ctx} positions)",
            sum(sizes.kv for i in range(sizes.n_layer) if i not in on_gpu),
            sum(sizes.kv for i in range(sizes.n_layer) if i in on_gpu),
            f"{sizes.kv * sizes.n_layer // sizes.n_ctx / 1024:.0f} KiB each",
        ),
        Item(
            "compute",
            int(used * sizes.compute),
            sizes.compute if chosen else 0,
            f"{output_rows} logits rows",
        ),
        Item("logits", 4 * vocab * output_rows),
        Item("adapter", adapter),
    )
    kept = "mapped file" if mapped else "read into memory"
    table = 0
    if copied_pages(gguf, repacks, chosen) is not None:
        kept = "copied from the mapped file"
        # What is not copied is mapped with the rest while that is; what comes later takes its
        # place.
        left = 0 if sizes.tied else sizes.embedding
        weights_ram -= left
        table = max(0, left - sum(item.ram for item in later))
    items = (
        Item("program", program + LIBRARIES),
        Item(
            f"weights ({gguf.weight_type})",
            weights_ram,
            sum(sizes.weights[i] for i in on_gpu),
            f"{sizes.weights[0] / MB:.1f} MB a layer, {kept}",
        ),
        Item("embedding", table, note="mapped while the weights are copied"),
        *later,
        Item("features", features),
        Item("GPU margin", 0, GPU_MARGIN if chosen else 0),
    )
    return Plan(items, chosen, count, free_vram, weights_ram if mapped else table)


class _Sizes:
    """Bytes of each layer; the output counts as layer `n_layer`, as llama.cpp has it."""

    def __init__(self, gguf: Gguf, n_ctx: int, kv_bytes: int, n_outputs: int) -> None:
        self.n_ctx, self.n_layer = n_ctx, gguf.n_layer
        self.weights = [0] * (self.n_layer + 1)
        self.embedding = gguf.tensors["token_embd.weight"].size
        self.tied = "output.weight" not in gguf.tensors
        for name, info in gguf.tensors.items():
            if match := _LAYER.match(name):
                self.weights[min(int(match[1]), self.n_layer)] += info.size
            elif name.startswith("output"):
                self.weights[self.n_layer] += info.size
        if self.tied:
            self.weights[self.n_layer] += self.embedding
        key, value = gguf.head_dim
        self.kv = n_ctx * gguf.n_head_kv * (key + value) * kv_bytes
        self.compute = _compute(gguf, n_ctx, n_outputs)

    def layers(self, n_gpu_layers: int) -> range:
        """The layers that llama.cpp puts on the GPU: the last ones."""
        return range(self.n_layer + 1 - n_gpu_layers, self.n_layer + 1)

    def vram(self, n_gpu_layers: int) -> int:
        layers = self.layers(n_gpu_layers)
        kv = self.kv * sum(i < self.n_layer for i in layers)
        return sum(self.weights[i] for i in layers) + kv + self.compute + GPU_MARGIN


def _compute(gguf: Gguf, n_ctx: int, n_outputs: int) -> int:
    """llama.cpp's scratch buffer for a full micro-batch.

    A model of its allocator's peak, in floats for each position: either the FFN's two halves and
    seven rows of width D, or (gate and up in one matrix) three halves and three rows; plus the
    attention mask. Compared with what llama.cpp reserves in tests/test_placement.py.
    """
    n_tokens = min(n_ctx, _UBATCH)
    width = gguf.n_embd
    halves = gguf.integer("{arch}.feed_forward_length", 4 * width)
    if gguf.arch == "qwen":  # counts both halves
        halves //= 2
    fused = "blk.0.ffn_gate.weight" not in gguf.tensors
    row = 3 * halves + 3 * width if fused else 2 * halves + 7 * width
    return 4 * max(n_tokens * (row + n_ctx // 2), n_outputs * gguf.n_vocab)


def open_planned(
    path: Path, planned: Plan, *, opener: Callable[..., Backbone] | None = None, **options: Any
) -> Backbone:
    """Open a backbone with the planned layers on the GPU, or with fewer if it refuses them.

    Free memory changes and llama.cpp has no call that fits layers, so the plan may be wrong. Each
    attempt takes three quarters of the layers, the last one none; what was given up is in
    `info["warnings"]`. options: those of `Backbone.open`. Raises the first error if even the CPU
    does not do.
    """
    if opener is None:
        from mse_runtime.backbone import Backbone

        opener = Backbone.open
    layers, first = planned.n_gpu_layers, None
    while True:
        try:
            backbone = opener(path, n_gpu_layers=layers, **options)
        except BackboneError as error:
            first = first or error
            if not layers:
                raise first from None
            layers = layers * 3 // 4
            continue
        if layers < planned.n_gpu_layers:
            backbone.info["warnings"].append(
                f"the GPU took {layers} of the {planned.n_gpu_layers} planned layers ({first})"
            )
        return backbone


# What is there


def free_vram() -> int:
    """Free bytes on all GPUs that llama.cpp can use; 0 without one. Loads llama.cpp."""
    from mse_runtime.backbone.library import devices

    return sum(device.free for device in devices() if device.kind in ("gpu", "igpu"))


def gpu_problem() -> str | None:
    """Why no GPU can be used, and what to do about it; None where one can."""
    from mse_runtime.backbone.library import devices
    from mse_runtime.nvml import NvmlError, read

    if any(device.kind in ("gpu", "igpu") for device in devices()):
        return None
    try:
        _, found = read()
    except NvmlError as error:
        return f"There is no GPU that could be used: {error}"
    if not found:
        return "There is no GPU that could be used: the driver sees none."
    return (
        f"llama.cpp was built without GPU support, so it cannot use the {found[0].name}. Rebuild "
        "it: CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir "
        "--no-binary llama-cpp-python llama-cpp-python"
    )


def check_gpu(planned: Plan, info: dict[str, Any] | None = None) -> None:
    """Raise DeviceError, with the reason, where no layer would run (or, given a loaded
    backbone's `info`, none runs) on a GPU.
    """
    if problem := gpu_problem():
        raise DeviceError(f"A GPU is required and cannot be used. {problem}")
    if not planned.n_gpu_layers:
        raise DeviceError(
            f"A GPU is required, but no layer fits: {planned.free_vram // MB} MB of its memory are "
            "free. Close other programs that use it, or take a smaller model."
        )
    if info is not None and not info.get("offloaded_layers"):
        raise DeviceError(
            "A GPU is required, but llama.cpp put no layer there: "
            f"{'; '.join(_texts(info.get('warnings'))) or 'it gave no reason'}. Run mse-doctor."
        )


def _texts(values: Any) -> Sequence[str]:
    return [str(value) for value in values] if isinstance(values, list | tuple) else []


def _taken(part: str, buffers_mib: Mapping[str, float]) -> str:
    """MB of llama.cpp's buffers of one part of the table; its head for the head."""
    if part == "part":
        return "llama.cpp took"
    kind = {"weights": "model", "KV": "KV", "compute": "compute"}.get(part.split(" ")[0])
    found = [size for name, size in buffers_mib.items() if kind and name.endswith(" " + kind)]
    return f"{sum(found) * 2**20 / MB:.0f}" if found else ""


def _mb(size: int) -> str:
    return f"{size / MB:.0f}" if size else ""
