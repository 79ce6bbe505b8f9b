"""A GPU that disappears in the middle: the CPU takes over, once, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from mse_runtime.adapter.backends import Adapter, Lengths, Rows
from mse_runtime.errors import MSEError

__all__ = ["WithSpare"]

log = logging.getLogger("mse_runtime")


class WithSpare:
    """An adapter on a GPU, and on the CPU from the first call on that the GPU fails.

    `name` and `choice` are those of the one that answers. Errors meant for the user (inputs that
    no backend takes) are passed on.
    """

    def __init__(self, gpu: Adapter, spare: Callable[[], Adapter]) -> None:
        self._now = gpu
        self._spare: Callable[[], Adapter] | None = spare
        self._turn = Lock()
        self.name, self.choice = gpu.name, gpu.choice
        self.n_pseudo, self.n_embd = gpu.n_pseudo, gpu.n_embd

    def __call__(
        self,
        audio: Rows,
        audio_len: Lengths,
        video: Rows,
        video_len: Lengths,
        text: Rows,
        text_len: Lengths,
    ) -> Rows:
        inputs = (audio, audio_len, video, video_len, text, text_len)
        with self._turn:
            try:
                return self._now(*inputs)
            except MSEError:
                raise
            except Exception as error:  # a driver's, ONNX Runtime's: they have no common base
                if self._spare is None:
                    raise
                self._fall_back(error)
            return self._now(*inputs)

    def _fall_back(self, error: Exception) -> None:
        assert self._spare is not None
        gone, self._now, self._spare = self._now, self._spare(), None
        why = f"{gone.name} failed in the middle ({str(error).strip().partition(chr(10))[0]})"
        self.name, self.choice = self._now.name, f"{self._now.name}: {why}"
        log.warning("%s: the adapter goes on on the CPU (%s)", why, self.name)
        with suppress(Exception):  # what was on the GPU may be gone with it
            gone.close()

    def close(self) -> None:
        self._now.close()
