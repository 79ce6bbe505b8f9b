"""First-run probe: does llama.cpp's fastest path live on this CPU?

Repacked weights and AMX tiles are two to three times faster, but some builds die there by an
illegal instruction (a compiler's fault: GCC 12 loses most of the tile configuration). No flag
tells beforehand, and the signal would take the user's process along. So a child process runs a
tiny model first; how it ends is remembered for this build of llama.cpp and this CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mse_runtime import cache, cpu
from mse_runtime.errors import BackboneError
from mse_runtime.records import dataclass

__all__ = ["ProbeResult", "fast_path"]

_CACHE = "probe.json"
_TIMEOUT = 120.0
_LIMIT = 0.05  # the two paths round differently, by 0.1 % of the largest logit; wrong is wrong
_PLAIN, _FAST = "plain", "fast"
# Signals of code that the CPU cannot run or that computes nonsense.
_FAULTS = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found."""

    extra_bufts: bool
    """Whether repacking and AMX may be used."""
    outcome: str
    """`ok`, or how the child ended."""
    seconds: float
    """What the probe cost when it ran."""
    remembered: bool
    """From an earlier run, at no cost."""

    @property
    def warning(self) -> str | None:
        """One sentence for the user where the slow path had to be taken."""
        if self.extra_bufts:
            return None
        return (
            f"llama.cpp's fast path does not work here ({self.outcome}), so the slow one is used. "
            "Rebuild it to get two to three times the speed: see `mse-doctor`."
        )


def fast_path(command: Sequence[str] | None = None, *, force: bool = False) -> ProbeResult:
    """Whether llama.cpp may repack weights here, asking a child process the first time.

    command: what to run instead of the real child (for tests). force: ask again.
    Raises BackboneError where the build doesn't run on this CPU at all.
    """
    from mse_runtime.backbone import library

    key = hashlib.sha256(f"{library.build_id()} {cpu.model()}".encode()).hexdigest()[:24]
    if not force and isinstance(entry := cache.read_json(_CACHE).get(key), dict):
        try:
            return ProbeResult(
                bool(entry["extra_bufts"]), str(entry["outcome"]), float(entry["seconds"]), True
            )
        except (KeyError, TypeError, ValueError):
            pass  # a damaged entry: ask again
    result, certain = _ask(command)
    log.info("probed llama.cpp's fast path in %.2f s: %s", result.seconds, result.outcome)
    if certain:
        entry = {"extra_bufts": result.extra_bufts, "outcome": result.outcome}
        cache.remember(_CACHE, key, entry | {"seconds": round(result.seconds, 3)})
    return result


def _ask(command: Sequence[str] | None) -> tuple[ProbeResult, bool]:
    """Run the child; the result, and whether it is worth remembering."""
    from mse_runtime.probe_model import write_probe_model

    begun = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="mse-probe-") as folder:
            model = write_probe_model(Path(folder) / "probe.gguf")
            child = subprocess.run(
                list(command or _child_command(model)),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT, check=False, start_new_session=True,
            )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        outcome = f"the probe could not run: {type(error).__name__}"
        return ProbeResult(False, outcome, time.perf_counter() - begun, False), False
    return _judge(
        child.returncode,
        child.stdout.decode(errors="replace").split(),
        time.perf_counter() - begun,
    )


def _judge(code: int, marks: list[str], seconds: float) -> tuple[ProbeResult, bool]:
    if code == 0 and _FAST in marks:
        return ProbeResult(True, "ok", seconds, False), True
    if code == 0 or (code > 0 and "differs" not in marks):
        outcome = f"the probe ended with exit code {code} and no answer"
        return ProbeResult(False, outcome, seconds, False), False
    if code < 0 and -code not in _FAULTS:  # Ctrl-C, a kill, too little memory: says nothing
        outcome = f"the probe was ended by {_signal_name(-code)}"
        return ProbeResult(False, outcome, seconds, False), False
    how = "it computes other numbers" if code > 0 else f"it died by {_signal_name(-code)}"
    if _PLAIN not in marks:
        raise BackboneError(
            f"This build of llama.cpp does not run on this CPU at all ({how}): it was compiled for "
            "another one. Rebuild it here: pip install --force-reinstall --no-cache-dir "
            "--no-binary llama-cpp-python llama-cpp-python"
        )
    return ProbeResult(False, how, seconds, False), True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _child_command(model: Path) -> list[str]:
    """This interpreter with this import path: the package may not be installed."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
        "from mse_runtime.probe import _child; _child(sys.argv[1])"
    )
    return [sys.executable, "-P", "-c", code, str(model), json.dumps(sys.path)]


def _child(model: str) -> None:
    """In the child: the plain path, then the fast one, a mark on stdout after each."""
    import resource

    import numpy as np

    from mse_runtime.backbone import Backbone
    from mse_runtime.probe_model import N_VOCAB

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ids = np.arange(40) % N_VOCAB
    logits = []
    for mark, extra in ((_PLAIN, False), (_FAST, True)):
        with Backbone.open(
            model, n_ctx=256, threads=1, extra_bufts=extra, tree_width=0, n_outputs_max=1
        ) as backbone:
            # A batch takes the tiles, a single token the vector kernels.
            logits.append(np.stack([backbone.prefill(ids), backbone.prefill([3])]))
        if mark == _FAST and np.abs(logits[1] - logits[0]).max() > _LIMIT * np.abs(logits[0]).max():
            print("differs", flush=True)
            sys.exit(1)
        print(mark, flush=True)
