"""Child processes of the benches: whole programs, timed from their start, and peers that serve."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from common import Record, available_bytes, child_environment

HERE = Path(__file__).resolve().parent
# What mse_export's profiles and transformers' configurations come to, in parameters.
PARAMETERS = {"tiny": 4e6, "qwen-1.8b": 1.84e9, "chatglm3-6b": 6.24e9, "llama2-7b": 6.74e9}


def run(*arguments: str, code: str | None = None) -> tuple[float, Record]:
    """Seconds of a whole Python process, and the JSON object on its last line of output."""
    source = ["-c", code] if code is not None else []
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *source, *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    took = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(
            f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-800:]}"
        )
    text = done.stdout.strip().splitlines()
    return took, json.loads(text[-1]) if text and text[-1].startswith("{") else {}


def mse_run(*arguments: str) -> tuple[float, Record]:
    """Seconds of `mse-run ... --jsonl` as a user starts it, and its result."""
    return run(*arguments, code="from mse_runtime.entry import mse_run; mse_run()")


class PeerProcess:
    """`peer.py` with its model made; a context manager."""

    def __init__(self, request: Record, dtype: str, threads: int, device: str = "cpu") -> None:
        self.dtype = dtype
        self._process = subprocess.Popen(
            [
                sys.executable, str(HERE / "peer.py"), json.dumps(request), "--dtype", dtype,
                "--threads", str(threads), "--device", device,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=child_environment(), text=True,
        )  # fmt: skip
        self._read()

    def ask(self, command: str) -> Record:
        if self._process.stdin is None:
            raise SystemExit("the peer has no input")
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def answer(self) -> float:
        """Seconds from features to generated ids."""
        return float(self.ask("answer")["seconds"])

    def _read(self) -> Record:
        process = self._process
        if process.stdout is None or process.stderr is None:
            raise SystemExit("the peer has no output")
        if not (text := process.stdout.readline()):
            process.wait()
            raise SystemExit(f"the peer stopped: {process.stderr.read()[-800:]}")
        return dict(json.loads(text))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def peer_missing(shape: str, dtype: str) -> str:
    """Why the peer cannot run here; empty where it can."""
    import importlib.util

    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    wanted = PARAMETERS[shape] * (2 if dtype == "bf16" else 4) + 1e9
    if (room := available_bytes()) and wanted > room:
        return f"{dtype} needs {wanted / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
    return ""
