"""`auto`: the fastest adapter backend on this machine, measured once and remembered.

The measurement is a handful of calls side by side with ONNX Runtime. A candidate must give the
same numbers and be clearly faster. Before a native kernel runs for the first time its name is
written down, so that a machine where it kills the process falls back to `onnx` the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from mse_runtime import cache
from mse_runtime.adapter import Adapter, Inputs, Provider, kernel_reasons, open_backend
from mse_runtime.bundle import Bundle
from mse_runtime.errors import DeviceError, MSEError

__all__ = ["FILE", "open_best"]

FILE = "adapter-auto.json"
MAX_REMEMBERED = 64
BUDGET = 0.12  # seconds of measurement in all
ROUNDS = 30
WORTH_IT = 0.9  # another backend must need less than this part of ONNX Runtime's time
TOLERANCE = 1e-4  # of the largest value, between backends


def open_best(bundle: Bundle, threads: int, provider: Provider) -> Adapter:
    """The backend that `auto` stands for, opened; its `choice` gives the reason."""
    rival = "kernels-cuda" if provider == "cuda" else "kernels-cpu"
    reason = kernel_reasons().get(rival, "not installed")
    try:
        standard = open_backend(bundle, "onnx", threads, provider)
    except DeviceError as error:
        return _without_onnx(bundle, threads, provider, None if reason else rival, error)
    if reason is not None:
        return _chosen(standard, f"{rival} cannot be used here ({reason})")
    key = _key(bundle, threads, provider)
    facts = cache.read_json(FILE)
    known = facts.get(key)
    if isinstance(known, dict):
        return _remembered(bundle, threads, provider, standard, rival, known)
    if not _remember(key, {"trying": rival, "pid": os.getpid()}):
        return _chosen(standard, "the cache folder cannot be written, so nothing is measured")
    fact: dict[str, Any] | None = None
    try:
        fact = _compare(bundle, threads, provider, standard, rival)
    finally:
        _remember(key, fact)
    return _remembered(bundle, threads, provider, standard, rival, fact)


def _without_onnx(
    bundle: Bundle, threads: int, provider: Provider, rival: str | None, error: DeviceError
) -> Adapter:
    """ONNX Runtime cannot be used: the kernel, or on the CPU the plain reference."""
    if rival:
        return _chosen(open_backend(bundle, rival, threads, provider), f"no ONNX Runtime: {error}")
    if provider == "cuda":
        raise error
    return _chosen(open_backend(bundle, "numpy", threads, provider), f"no ONNX Runtime: {error}")


def _remembered(
    bundle: Bundle,
    threads: int,
    provider: Provider,
    standard: Adapter,
    rival: str,
    fact: dict[str, Any],
) -> Adapter:
    if "trying" in fact:
        if _alive(fact.get("pid")):
            return _chosen(standard, f"another process is measuring {rival} just now")
        return _chosen(
            standard,
            f"a former run ended while it tried {rival} (to try again, delete "
            f"{cache.cache_dir() / FILE})",
        )
    why = str(fact.get("why", "remembered"))
    if fact.get("backend") != rival:
        return _chosen(standard, why)
    try:
        return _chosen(open_backend(bundle, rival, threads, provider), why)
    except MSEError as error:
        return _chosen(standard, f"{rival} was faster here, but does not start now: {error}")


def _compare(
    bundle: Bundle, threads: int, provider: Provider, standard: Adapter, rival: str
) -> dict[str, Any]:
    try:
        other = open_backend(bundle, rival, threads, provider)
    except MSEError as error:
        return {"backend": standard.name, "why": f"{rival} does not start: {error}"}
    try:
        inputs = _sample(bundle)
        reference, found = standard(*inputs), other(*inputs)
        difference = float(np.abs(found - reference).max() / max(np.abs(reference).max(), 1e-30))
        if not difference <= TOLERANCE:
            why = f"{rival} differs from onnx by {difference:.1e} of the largest value"
            return {"backend": standard.name, "why": why}
        slow, fast = _time(standard, other, inputs)
    finally:
        other.close()
    winner = rival if fast < WORTH_IT * slow else standard.name
    return {
        "backend": winner,
        "why": f"measured on this machine, best call: {rival} {fast * 1e3:.2f} ms, "
        f"{standard.name} {slow * 1e3:.2f} ms",
    }


def _time(one: Adapter, other: Adapter, inputs: Inputs) -> tuple[float, float]:
    """Best seconds of each, taken in turns so that other load on the machine meets both."""
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + BUDGET
    for _ in range(ROUNDS):
        for i, adapter in enumerate((one, other)):
            before = time.perf_counter()
            adapter(*inputs)
            best[i] = min(best[i], time.perf_counter() - before)
        if time.perf_counter() > end:
            break
    return best[0], best[1]


def _sample(bundle: Bundle) -> Inputs:
    """One utterance of a usual length: some seconds of features and a sentence."""
    info, features = bundle.adapter, bundle.features
    rng = np.random.default_rng(0)
    arrays: list[Any] = []
    for steps, width in (
        (min(features.audio.max_steps, 250), info.audio_dim),
        (min(features.face.max_steps, 25), info.face_dim),
        (min(bundle.text.max_tokens, 50), info.n_embd),
    ):
        arrays += [
            rng.standard_normal((1, steps, width), dtype=np.float32),
            np.array([steps], np.int64),
        ]
    return tuple(arrays)


def _key(bundle: Bundle, threads: int, provider: Provider) -> str:
    """What the measurement depends on: the adapter's shape, the machine, the libraries."""
    info = bundle.adapter
    shape = [info.n_pseudo, info.n_embd, info.audio_dim, info.face_dim]
    shape += [info.audio_hidden, info.face_hidden]
    libraries = [_version(name) for name in _LIBRARIES]
    parts = [shape, threads, provider, platform.machine(), cpu_model(), libraries]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "mse-runtime", "numpy")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def cpu_model() -> str:
    """The CPU's name as the kernel gives it, or the platform's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
            for line in lines:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _remember(key: str, fact: dict[str, Any] | None) -> bool:
    """Write the fact under `key`, or take the key out; False where that cannot be written."""
    facts = cache.read_json(FILE)
    facts.pop(key, None)
    kept: Sequence[tuple[str, Any]] = list(facts.items())[1 - MAX_REMEMBERED :]
    new = {} if fact is None else {key: fact}
    return cache.write_json(FILE, {**dict(kept), **new})


def _alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return isinstance(pid, int) and pid == os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _chosen(adapter: Adapter, why: str) -> Adapter:
    adapter.choice = f"{adapter.name}: {why}"
    return adapter
