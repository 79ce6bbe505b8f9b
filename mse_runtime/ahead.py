"""The transcript's pass through the language model, while the clip is still being read.

It saves time where it is over when the features come, or nearly. Otherwise it is given up then: one
pass for transcript and features together reads the weights once. How long it takes is found out by
the first of a model on a machine and remembered, nothing of what was said.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime import cache, cpu
from mse_runtime.errors import StoppedError
from mse_runtime.sizing import SMALL_MODEL

if TYPE_CHECKING:
    from mse_runtime.backbone import Backbone
    from mse_runtime.bundle import Bundle

__all__ = ["prefill"]

FILE = "ahead.json"
NEARLY = 2 / 3
"""Of the pass that must be over for the rest to be waited for."""
_ROWS = 32  # which take as long as fewer
_CHANGED = 0.25  # of the remembered time
_LONGEST = 1e5  # seconds; longer is damage


def prefill(
    backbone: Backbone, bundle: Bundle, ids: NDArray[np.int32], features: Future[Any]
) -> bool:
    """Append `ids` to sequence 0 unless the features come first; whether they are there now."""
    usual, key = 0.0, None
    if bundle.backbone.gguf.size >= SMALL_MODEL:  # a small one's pass is over at once
        key = _key(backbone, bundle, len(ids))
        known = cache.read_json(FILE).get(key)
        usual = known if isinstance(known, int | float) and 0 < known < _LONGEST else 0.0
    begun = time.perf_counter()
    with backbone.aside() as stop:

        def come(_: Future[Any]) -> None:
            if time.perf_counter() - begun < NEARLY * usual:
                stop()

        features.add_done_callback(come)
        try:
            backbone.prefill(backbone.embed(ids), logits="none")
        except StoppedError:
            return False
    took = time.perf_counter() - begun
    if key is not None and not abs(took - usual) < _CHANGED * usual:
        cache.remember(FILE, key, round(took, 3))
    return True


def _key(backbone: Backbone, bundle: Bundle, n: int) -> str:
    """What its duration depends on: model, machine, llama.cpp with its settings, and rows."""
    facts = [
        backbone.info[name]
        for name in ("build", "device", "offloaded_layers", "threads", "extra_bufts", "product")
    ]
    text = repr((bundle.backbone.gguf.sha256, cpu.model(), *facts, -(-n // _ROWS)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
