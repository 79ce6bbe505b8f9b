"""Child processes that extract features: a clip may crash or hang its own worker, nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mse_runtime import errors
from mse_runtime.errors import MediaError, MSEError, UsageError
from mse_runtime.features.npz import load_npz
from mse_runtime.features.spec import Features

__all__ = ["FeaturePool"]

# The parent's import path, not the current folder: a file beside the clips is not a module.
CHILD = (
    "import json, sys; sys.path[:] = [p for p in json.loads(sys.argv.pop(1)) if p]; "
    "from mse_runtime.batch.worker import main; main()"
)
MAX_REPLY = 1 << 16


class FeaturePool:
    """`workers` child processes; `submit` gives a future of `Features`.

    timeout: seconds one clip may take. memory_mb: address space of a worker, in MiB. A clip that
    goes over either, or kills its worker, fails with MediaError; the worker is replaced.
    Raises UsageError where there is no temporary folder for the features.
    """

    def __init__(self, workers: int, timeout: float, memory_mb: int) -> None:
        self.workers = workers
        self._timeout = timeout
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="mse-batch-")
        except OSError as error:
            raise UsageError(
                f"No temporary folder can be written ({error.strerror or error}), and a batch "
                "needs one for features. Make room, or name a folder in TMPDIR."
            ) from error
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(memory_mb) for _ in range(workers)]
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, "mse-worker")
        self._stopped = threading.Event()

    def submit(self, request: dict[str, Any]) -> Future[Features]:
        """Features for keyword arguments of `extract`."""
        return self._threads.submit(self._run, request)

    def _run(self, request: dict[str, Any]) -> Features:
        if self._stopped.is_set():
            raise MediaError("the batch was stopped")
        worker = self._idle.get()
        target = Path(self._folder.name) / f"{threading.get_ident()}.npz"
        try:
            reply = worker.ask({**request, "target": str(target)}, self._timeout)
            if "error" in reply:
                kind: Any = getattr(errors, str(reply["error"]["type"]), None)
                if not (isinstance(kind, type) and issubclass(kind, MSEError)):
                    kind = MediaError
                raise kind(str(reply["error"]["message"]))
            return load_npz(target)
        finally:
            self._idle.put(worker)
            target.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the workers, whatever they do."""
        self._stopped.set()
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.kill()
        self._folder.cleanup()

    def __enter__(self) -> FeaturePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Worker:
    """One child process, started when it is first asked and again after it died."""

    def __init__(self, memory_mb: int) -> None:
        self._memory = memory_mb
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            MediaError: no reply in `timeout` seconds, or the process died.
        """
        clip = request["path"]
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            return dict(json.loads(_reply(process.stdout, timeout)))
        except TimeoutError:
            self.kill()
            raise MediaError(
                f"{clip}: no features after {timeout:g} s, so it was given up. Give more time with "
                "--clip-timeout, or a shorter piece with start and end."
            ) from None
        except (OSError, ValueError, TypeError, RecursionError):
            raise MediaError(f"{clip}: {self._post_mortem()}") from None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, json.dumps(sys.path), str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        return self._process

    def _post_mortem(self) -> str:
        process = self._process
        self.kill()
        code = process.returncode if process else None
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"the decoder died ({signal.Signals(-code).name}); the clip is broken"
        return f"the decoder stopped (exit code {code}); it may need more than {self._memory} MB"

    def kill(self) -> None:
        """End the process if there is one. Safe from any thread."""
        process, self._process = self._process, None
        if process is not None:
            # A child that has already ended keeps its own exit status.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()


def _reply(stream: IO[bytes], timeout: float) -> bytes:
    """One line, in time and of a bounded length: who writes it may be a hostile clip by now."""
    end, line = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as ready:
        ready.register(stream, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not ready.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            piece = os.read(stream.fileno(), MAX_REPLY)
            line += piece
            if not piece or len(line) > MAX_REPLY:
                raise ValueError("no reply")
    return line
