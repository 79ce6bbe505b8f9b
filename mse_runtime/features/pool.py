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
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from mse_runtime.errors import BundleError, MediaError, MSEError, UsageError
from mse_runtime.features.child import Child, take_early

if TYPE_CHECKING:
    from mse_runtime.features.spec import Features

__all__ = ["FeaturePool"]

KINDS = {kind.__name__: kind for kind in (MSEError, UsageError, MediaError, BundleError)}
"""What a worker may report: the others end more than a clip, and are not its to raise."""
MAX_REPLY = 1 << 16
PIECE = 1 << 20
LOOK = 0.5
"""Seconds between two looks whether the pool was closed."""


class FeaturePool:
    """`workers` child processes; `submit` gives a future of `Features`.

    timeout: seconds one clip may take. memory_mb: address space of a worker, in MiB. None for no
    limit. once: a process ends after its first clip, and another one is started for the next.
    verbose: what workers and decoders write on stderr is seen, tracebacks among it. A clip that
    goes over a limit, or kills its worker, fails with MediaError; the worker is replaced.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout: float | None = None,
        memory_mb: int | None = None,
        *,
        once: bool = False,
        verbose: bool = False,
    ) -> None:
        self.workers = workers
        self._timeout = timeout
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._all = [_Worker(memory_mb, once, verbose, self._stopped) for _ in range(workers)]
        for worker in self._all:
            self._idle.put(worker)
        # The processes end with the threads that started them (`worker._end_with_parent`): these.
        self._threads = ThreadPoolExecutor(workers, "mse-worker")

    def start(self) -> None:
        """Start the processes before the first request: what they import is ready then.

        Raises OSError where the system allows no more.
        """
        for worker in self._all:
            self._threads.submit(worker.start).result()

    def submit(self, request: dict[str, Any]) -> Future[Features]:
        """Features for keyword arguments of `extract`; see `worker.answer` for the others."""
        return self._threads.submit(self._run, request)

    def _run(self, request: dict[str, Any]) -> Features:
        from dataclasses import replace

        from mse_runtime.features.npz import load_npz

        worker = self._idle.get()
        try:
            reply, content = worker.ask(request, self._timeout)
        finally:
            self._idle.put(worker)
        if "error" in reply:
            raise KINDS.get(reply["error"]["type"], MSEError)(reply["error"]["message"])
        try:
            features = load_npz(io.BytesIO(content), masked=True)
        except MediaError:
            raise MediaError(f"{request['path']}: its features cannot be read") from None
        return replace(features, process_peak=reply["peak_rss"])

    def retire(self) -> None:
        """No more requests; waits for processes that have had their only clip to end."""
        self._threads.shutdown(wait=False)
        for worker in self._all:
            worker.reap()

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
    """One child process, started when it is first asked and again after it ended."""

    def __init__(
        self, memory_mb: int | None, once: bool, verbose: bool, stopped: threading.Event
    ) -> None:
        self._memory = memory_mb
        self._once = once
        self._verbose = verbose
        self._stopped = stopped
        self._process: Child | None = None

    def ask(self, request: dict[str, Any], timeout: float | None) -> tuple[dict[str, Any], bytes]:
        """Send one request and wait for its reply and the feature file with it.

        Raises:
            MediaError: no reply in `timeout` seconds, one that makes no sense, or the process died.
        """
        clip, line = request["path"], json.dumps(request).encode() + b"\n"
        process = self._process
        if process is None or process.stdin.closed:
            process = self.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            found = _reply(process.stdout, timeout, self._stopped)
            if self._once:
                with contextlib.suppress(OSError):
                    process.stdin.close()  # its input ends, and so does it
            return found
        except TimeoutError:
            self.kill()
            raise MediaError(
                f"{clip}: no features after {timeout:g} s, so it was given up. Give more time with "
                "--clip-timeout, or a shorter piece with start and end."
            ) from None
        except _TooMuchError as error:
            self.kill()
            raise MediaError(f"{clip}: {error}") from None
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            raise MediaError(f"{clip}: {self._post_mortem()}") from None

    def start(self) -> Child:
        """A new process; MediaError where the pool is closed, OSError where there can be none."""
        self.kill()
        made = None if self._memory or self._verbose else take_early()
        self._process = made = made or Child(self._memory, verbose=self._verbose)
        if self._stopped.is_set():  # `close` may not have seen it
            self.kill()
            raise MediaError("the extraction was stopped")
        return made

    def _post_mortem(self) -> str:
        process, code = self._process, None
        if process is not None:  # before its input is closed, which would end it, too
            code = process.wait(0.05)
        self.kill()
        if code is None:
            return "the process that reads it gave no reply that makes sense"
        why = f"; it may need more than {self._memory} MB" if self._memory else ""
        if code == -signal.SIGKILL:
            return f"the process that reads it was killed, perhaps for want of memory{why}"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"the decoder died ({signal.Signals(-code).name}); the clip is broken"
        return f"the decoder stopped (exit code {code}){why}"

    def reap(self) -> None:
        """Wait for a process whose input was closed; others are left alone."""
        process = self._process
        if process is not None and process.stdin.closed:
            self.kill()

    def kill(self) -> None:
        """End the process if there is one. Safe from any thread."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        if process.wait(0.05) is None:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError):
            process.stdout.close()


class _TooMuchError(Exception):
    """More features than are taken."""


def _reply(
    stream: IO[bytes], timeout: float | None, stopped: threading.Event
) -> tuple[dict[str, Any], bytes]:
    """A reply in time and of a bounded length: who writes it may be a hostile clip by now."""
    from mse_runtime.features.npz import MAX_BYTES

    end = float("inf") if timeout is None else time.monotonic() + timeout
    data = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(stream, selectors.EVENT_READ)

        def more() -> None:
            while not ready.select(max(0.0, min(LOOK, end - time.monotonic()))):
                if stopped.is_set():
                    raise ValueError("stopped")
                if time.monotonic() >= end:
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
        if not (type(size) is type(peak) is int and size >= 0 and 0 <= peak < 1 << 50):
            raise ValueError("no reply of ours")
        if size > MAX_BYTES + MAX_REPLY:
            raise _TooMuchError(
                f"its features take {size >> 20} MB, over {MAX_BYTES >> 20} MB. Take a shorter "
                "piece, or fewer frames a second."
            )
        if "error" in reply:
            reply["error"] = {key: str(reply["error"][key]) for key in ("type", "message")}
        del data[: length + 1]
        while len(data) < size:
            more()
    if len(data) != size:
        raise ValueError("more than the reply")
    return reply, bytes(data)
