"""How many clips of a batch share a pass through the language model: measured, and remembered.

The first groups of a batch are of every size in turns. The smallest size that is about as fast as
the fastest stays, in later batches too: on a few cores one clip fills a large model's pass already,
a small model or many cores take several.
"""

from __future__ import annotations

import hashlib
import statistics
from typing import TYPE_CHECKING

from mse_runtime import cache, cpu, memory

if TYPE_CHECKING:
    from mse_runtime.analyzer import Analyzer

__all__ = ["FILE", "SIZES", "GroupSize"]

FILE = "together.json"
SIZES = (1, 2, 4, 8)
TRIES = 3  # of each size; the first one also makes room for it
WORTH_IT = 1.05  # a larger group must save more than this, since its rows wait for each other
SPARE = 0.25  # of the planned memory must be free besides, or clips go one by one


class GroupSize:
    """The size of the next group, while sizes are tried and afterwards."""

    def __init__(self, analyzer: Analyzer) -> None:
        self._key = _key(analyzer)
        known = cache.read_json(FILE).get(self._key)
        sizes = SIZES if _room_for_groups(analyzer) else SIZES[:1]
        self._times: dict[int, list[float]] = {size: [] for size in sizes}
        self._chosen = known if known in sizes else sizes[0] if len(sizes) == 1 else None
        self._failed = 0
        self.together = True
        """Whether passes are for whole prompts, of a group or of a single clip."""

    @property
    def next(self) -> int:
        """Clips that the next group should have."""
        if self._chosen is not None:
            return self._chosen
        return min(self._times, key=lambda size: (len(self._times[size]), size))

    def took(self, size: int, seconds: float) -> None:
        """A group of `size` took so long for each position that was new in it."""
        if not self.measuring or size not in self._times:
            return
        self._times[size].append(seconds)
        if min(map(len, self._times.values())) < TRIES:
            return
        typical = {size: statistics.median(found) for size, found in self._times.items()}
        limit = WORTH_IT * min(typical.values())
        self._chosen = next(size for size in self._times if typical[size] <= limit)
        cache.remember(FILE, self._key, self._chosen)

    @property
    def measuring(self) -> bool:
        """Whether no size has been chosen yet."""
        return self._chosen is None

    def passed(self) -> None:
        """A pass went through."""
        self._failed = 0

    def failed(self, *, for_good: bool) -> None:
        """A pass failed, for lack of memory (`for_good`) or perhaps because of a row in it.

        Clip by clip from now on, in this batch, after the first or twice in a row.
        """
        self._failed += 1
        if for_good or self._failed > 1:
            self._chosen, self.together = 1, False


def _room_for_groups(analyzer: Analyzer) -> bool:
    """A group's cache and buffers take a tenth more than the plan: they must be far from the limit.

    A GPU's memory is planned to be full, and no group has been tried on one: there it is no.
    """
    if analyzer.low_memory or analyzer.backbone_info["offloaded_layers"]:
        return False
    room = memory.available()
    return not room or room >= analyzer.plan.ram * SPARE


def _key(analyzer: Analyzer) -> str:
    """What the speed of a pass depends on: model, prompt, machine, llama.cpp and its settings."""
    info = analyzer.backbone_info
    bundle = analyzer.bundle
    facts = [info[name] for name in ("build", "device", "offloaded_layers", "threads", "product")]
    prompts = [repr(task.prompt) for task in bundle.tasks.values()]
    text = repr((bundle.backbone.gguf.sha256, prompts, facts, cpu.model()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
