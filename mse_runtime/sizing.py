"""What a bundle needs of the machine: positions, threads, memory."""

from __future__ import annotations

import re

from mse_runtime.bundle import Bundle
from mse_runtime.gguf import Gguf
from mse_runtime.placement import Plan, check_gpu, free_vram, plan

__all__ = ["default_threads", "make_plan", "positions", "vram_mb"]

SMALL_MODEL = 32_000_000
HOST_BUFFER = re.compile(r"CPU|AMX|\S+_Host")
# ONNX Runtime, PyAV, the face networks and a clip's frames in flight: set from measured peaks of
# `tiny` on the example clips, so its plan is no prediction there (bench/memory.py).
FEATURE_BYTES = 80_000_000
# What a Python process with NumPy has before that.
PROCESS_BYTES = 45_000_000


def make_plan(
    bundle: Bundle,
    *,
    n_gpu_layers: int | None = None,
    low_memory: bool = False,
    require_gpu: bool = False,
    program: int | None = None,
    feature_process: bool = False,
) -> Plan:
    """Where `bundle`'s memory would go on this machine; loads nothing but llama.cpp itself.

    program: bytes of the process before anything of the plan is used; default what it has now.
    feature_process: clips are read in a process of its own.
    """
    from mse_runtime.backbone.file_checks import repacking_pays
    from mse_runtime.probe import fast_path

    with Gguf.open(bundle.gguf_path()) as gguf:
        # Asked for every model, and before llama.cpp is loaded here: a build for another CPU kills
        # the process that loads it.
        fast = fast_path()
        made = plan(
            gguf,
            n_ctx=positions(bundle),
            low_memory=low_memory,
            extra_bufts=repacking_pays(gguf) and fast.extra_bufts,
            n_gpu_layers=n_gpu_layers,
            free_vram=free_vram(),
            positions=positions(bundle),
            adapter=bundle.adapter.onnx.size,
            features=FEATURE_BYTES + (PROCESS_BYTES if feature_process else 0),
            program=program,
        )
    if require_gpu:
        check_gpu(made)
    return made


def default_threads(bundle: Bundle) -> int | None:
    """One thread for a model that fits a core's cache, else None: the physical cores.

    A small model's matrices are done before a second thread has been woken, and on a busy machine
    the hand-offs cost more than the arithmetic (bench/latency.py).
    """
    return 1 if bundle.backbone.gguf.size < SMALL_MODEL else None


def positions(bundle: Bundle) -> int:
    """Positions one utterance needs, estimated before there is a tokeniser.

    Two characters of ASCII to a token is more than any of the known vocabularies needs, and other
    scripts may fall back to bytes. Where it is not enough, `Backbone.reserve` makes room.
    """
    fixed = max(
        sum(2 + estimate_tokens(segment.text or "") for segment in task.prompt)
        + task.max_new_tokens
        for task in bundle.tasks.values()
    )
    return fixed + bundle.text.max_tokens + bundle.adapter.n_pseudo


def estimate_tokens(text: str) -> int:
    ascii_letters = sum(char.isascii() for char in text)
    return ascii_letters // 2 + len(text.encode()) - ascii_letters


def vram_mb(buffers_mib: dict[str, float]) -> float | None:
    """MB (10^6 bytes) of llama.cpp's buffers that are on a device; None where none is."""
    on_device = [size for name, size in buffers_mib.items() if not HOST_BUFFER.match(name)]
    return sum(on_device) * 1.048576 or None
