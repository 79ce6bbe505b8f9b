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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mse_runtime import cache, cpu
from mse_runtime.adapter.backends import Adapter, Inputs, Provider, open_backend
from mse_runtime.bundle import Bundle
from mse_runtime.errors import DeviceError, MSEError

__all__ = ["FILE", "open_best"]

FILE = "adapter-auto.json"
BUDGET = 0.12  # seconds of measurement in all
ROUNDS = 30
WORTH_IT = 0.9  # another backend must need less than this part of ONNX Runtime's time
TOLERANCE = 1e-4  # of the largest value, between backends


def open_best(bundle: Bundle, threads: int, provider: Provider) -> Adapter:
    """The backend that `auto` stands for, opened; its `choice` gives the reason."""
    rival = "kernels-cuda" if provider == "cuda" else "kernels-cpu"
    key = _key(bundle, threads, provider)
    known = cache.read_json(FILE).get(key)
    fact: dict[str, Any] = known if isinstance(known, dict) else {}
    if fact.get("backend") == rival:
        try:
            return _chosen(open_backend(bundle, rival, threads, provider), str(fact.get("why")))
        except DeviceError as error:
            fact = {"why": f"{rival} was faster here, but does not start now ({error})"}
    try:
        standard = open_backend(bundle, "onnx", threads, provider)
    except DeviceError as error:
        return _without_onnx(bundle, threads, provider, rival, error)
    if not fact:
        return _measured(bundle, threads, provider, standard, rival, key)
    return _chosen(standard, _told(fact, rival))


def _without_onnx(
    bundle: Bundle, threads: int, provider: Provider, rival: str, error: DeviceError
) -> Adapter:
    """ONNX Runtime cannot be used: the kernel, or on the CPU the plain reference."""
    why = f"no ONNX Runtime ({error})"
    try:
        return _chosen(open_backend(bundle, rival, threads, provider), why)
    except DeviceError:
        if provider == "cuda":
            raise error from None
    return _chosen(open_backend(bundle, "numpy", threads, provider), why)


def _told(fact: dict[str, Any], rival: str) -> str:
    """Why ONNX Runtime, from what is remembered."""
    if "trying" not in fact:
        return str(fact.get("why"))
    if _alive(fact.get("pid")):
        return f"another process is measuring {rival} just now"
    return (
        f"a former run ended while it tried {rival} (to try again, delete "
        f"{cache.cache_dir() / FILE})"
    )


def _measured(
    bundle: Bundle, threads: int, provider: Provider, standard: Adapter, rival: str, key: str
) -> Adapter:
    """Measure `rival` beside `standard`, remember the result and give the winner."""
    if not cache.remember(FILE, key, {"trying": rival, "pid": os.getpid()}):
        return _chosen(standard, "the cache folder cannot be written, so nothing is measured")
    fact: dict[str, Any] | None = None
    try:
        other = open_backend(bundle, rival, threads, provider)
        fact = {"adapter": _shape(bundle, threads)} | _compare(standard, other, _sample(bundle))
    except MSEError as error:  # not remembered: what is missing may be installed later
        return _chosen(standard, str(error))
    finally:
        cache.remember(FILE, key, fact)
    winner, loser = (other, standard) if fact["backend"] == rival else (standard, other)
    loser.close()
    return _chosen(winner, str(fact["why"]))


def _compare(standard: Adapter, other: Adapter, inputs: Inputs) -> dict[str, Any]:
    reference, found = standard(*inputs), other(*inputs)
    difference = float(np.abs(found - reference).max() / max(np.abs(reference).max(), 1e-30))
    if not difference <= TOLERANCE:
        why = f"{other.name} differs from onnx by {difference:.1e} of the largest value"
        return {"backend": standard.name, "why": why}
    slow, fast = _time(standard, other, inputs)
    return {
        "backend": other.name if fast < WORTH_IT * slow else standard.name,
        "why": f"measured on this machine, best call: {other.name} {fast * 1e3:.2f} ms, "
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


def _shape(bundle: Bundle, threads: int) -> str:
    """What was measured, for people: widths in, pseudo tokens out, threads."""
    info = bundle.adapter
    told = f"{info.audio_dim} + {info.face_dim} columns to {info.n_pseudo} x {info.n_embd}"
    return f"{told}, {threads} thread{'s' if threads > 1 else ''}"


def _key(bundle: Bundle, threads: int, provider: Provider) -> str:
    """What the measurement depends on: the adapter's shape, the machine, the libraries."""
    info = bundle.adapter
    shape = [info.n_pseudo, info.n_embd, info.audio_dim, info.face_dim]
    shape += [info.audio_hidden, info.face_hidden]
    libraries = [_stamp(name) for name in _LIBRARIES]
    parts = [shape, threads, provider, platform.machine(), cpu.model(), libraries]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_LIBRARIES = ("onnxruntime", "mse_runtime", "numpy")


def _stamp(name: str) -> list[int]:
    """Tells one installation of a package from another. (Asking for versions takes 40 ms.)"""
    try:
        spec = find_spec(name)
        stats = [Path(spec.origin).stat()] if spec and spec.origin else []
    except (OSError, ValueError):
        return []
    return [number for stat in stats for number in (stat.st_mtime_ns, stat.st_size, stat.st_ino)]


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
