"""Child processes that extract features: a clip may crash or hang its own worker, nothing else.

A process of its own is also faster where a model loads meanwhile: the way to the clip is Python as
much as the way to the weights, and Python runs in one thread of a process at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from mse_runtime import errors
from mse_runtime.errors import MediaError, MSEError

if TYPE_CHECKING:
    from mse_runtime.features.spec import Features

__all__ = ["FeaturePool"]

# The parent's import path, not the current folder: a file beside the clips is not a module.
CHILD = (
    "import json, sys; sys.path[:] = [p for p in json.loads(sys.argv.pop(1)) if p]; "
    "from mse_runtime.features.worker import main; main()"
)
MAX_REPLY = 1 << 16
PIECE = 1 << 20


class FeaturePool:
    """`workers` child processes; `submit` gives a future of `Features`.

    timeout: seconds one clip may take. memory_mb: address space of a worker, in MiB. None for no
    limit. A clip that goes over either, or kills its worker, fails with MediaError; the worker is
    replaced.
    """

    def __init__(
        self, workers: int = 1, timeout: float | None = None, memory_mb: int | None = None
    ) -> None:
        self.workers = workers
        self._timeout = timeout
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(memory_mb) for _ in range(workers)]
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, "mse-worker")
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the processes before the first request: what they import is ready then."""
        for worker in self._all:
            worker.start()

    def submit(self, request: dict[str, Any]) -> Future[Features]:
        """Features for keyword arguments of `extract`; see `worker.answer` for the others."""
        return self._threads.submit(self._run, request)

    def _run(self, request: dict[str, Any]) -> Features:
        from mse_runtime.features.npz import load_npz
        from mse_runtime.features.spec import CHILD_PEAK

        if self._stopped.is_set():
            raise MediaError("the extraction was stopped")
        worker = self._idle.get()
        try:
            reply, content = worker.ask(request, self._timeout)
        finally:
            self._idle.put(worker)
        if "error" in reply:
            kind: Any = getattr(errors, reply["error"]["type"], None)
            if not (isinstance(kind, type) and issubclass(kind, MSEError)):
                kind = MediaError
            raise kind(reply["error"]["message"])
        features = load_npz(io.BytesIO(content))
        features.info[CHILD_PEAK] = reply["peak_rss"]
        return features

    def retire(self) -> None:
        """No more requests: whoever ends this process next need not wait for `close`."""
        self._threads.shutdown(wait=False)

    def close(self) -> None:
        """Stop the workers, whatever they do."""
        self._stopped.set()
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.kill()

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

    def __init__(self, memory_mb: int | None) -> None:
        self._memory = memory_mb
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], timeout: float | None) -> tuple[dict[str, Any], bytes]:
        """Send one request and wait for its reply and the feature file with it.

        Raises:
            MediaError: no reply in `timeout` seconds, or the process died.
        """
        clip = request["path"]
        process = self._process or self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            return _reply(process.stdout, timeout)
        except TimeoutError:
            self.kill()
            raise MediaError(
                f"{clip}: no features after {timeout:g} s, so it was given up. Give more time with "
                "--clip-timeout, or a shorter piece with start and end."
            ) from None
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            raise MediaError(f"{clip}: {self._post_mortem()}") from None

    def start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, json.dumps(sys.path), str(self._memory or 0)],
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
        why = f"; it may need more than {self._memory} MB" if self._memory else ""
        return f"the decoder stopped (exit code {code}){why}"

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


def _reply(stream: IO[bytes], timeout: float | None) -> tuple[dict[str, Any], bytes]:
    """A reply in time and of a bounded length: who writes it may be a hostile clip by now."""
    from mse_runtime.features.npz import MAX_BYTES

    end = None if timeout is None else time.monotonic() + timeout
    data = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(stream, selectors.EVENT_READ)

        def more() -> None:
            if not ready.select(None if end is None else max(0.0, end - time.monotonic())):
                raise TimeoutError
            piece = os.read(stream.fileno(), PIECE)
            if not piece:
                raise ValueError("no reply")
            data.extend(piece)

        while (length := data.find(b"\n")) < 0:
            if len(data) > MAX_REPLY:
                raise ValueError("too long a reply")
            more()
        reply = dict(json.loads(bytes(data[:length])))
        size, peak = reply["size"], reply["peak_rss"]
        if not (type(size) is type(peak) is int and 0 <= size <= MAX_BYTES + MAX_REPLY):
            raise ValueError("no reply of ours")
        if "error" in reply:
            reply["error"] = {key: str(reply["error"][key]) for key in ("type", "message")}
        del data[: length + 1]
        while len(data) < size:
            more()
    if len(data) != size:
        raise ValueError("more than the reply")
    return reply, bytes(data)
