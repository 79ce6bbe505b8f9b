"""Thousands of clips in one process: does memory grow, do files stay open, is the cache freed?

    python bench/endurance.py [--bundle tiny] [--clips 2000] [--out F.jsonl]

The example clips are decoded, their features computed and answered over and over in one process,
through both of the bundle's tasks where it has two. Growth is the median of the resident set over
the last tenth of the run minus the one over the tenth that follows the warm-up; a peak that is
given back is no growth, and is shown beside it. At the end the KV cache is filled to its last
cell, which only works if no sequence has left any behind.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, Writer, machine, value

CLIPS = tuple(sorted((ROOT / "examples").glob("*.mp4")))
TEXTS = (
    "I really love it.",
    "I do not want to talk about it. It was a terrible day, and nobody even asked me how I was.",
    "Well. It is a table.",
    "Thank you so much for everything, this is the nicest thing that anybody did for me.",
)
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class State:
    """What this process holds: resident bytes, open file descriptors, threads."""

    rss: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> State:
        """Read from /proc, without memory of its own worth mentioning."""
        resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
        return cls(int(resident) * PAGE, files, threads)


@dataclass(frozen=True)
class Course:
    """The states after every answer, the warm-up left out."""

    states: Sequence[State]

    @property
    def window(self) -> int:
        return max(1, len(self.states) // 10)

    def _more(self, values: Sequence[float]) -> float:
        """Median of the last tenth minus median of the first: what came to stay."""
        return statistics.median(values[-self.window :]) - statistics.median(values[: self.window])

    @property
    def growth(self) -> float:
        """Bytes of the resident set."""
        return self._more([state.rss for state in self.states])

    @property
    def peak(self) -> int:
        """Bytes that the highest state lies above the first."""
        return max(state.rss for state in self.states) - self.states[0].rss

    @property
    def files(self) -> float:
        """File descriptors."""
        return self._more([state.files for state in self.states])

    @property
    def threads(self) -> float:
        """Threads; a decoder's may still be ending when its clip is answered."""
        return self._more([state.threads for state in self.states])


def course(work: Callable[[int], Any], count: int, warm_up: int) -> Course:
    """Call `work(i)` `warm_up` + `count` times."""
    states = []
    for i in range(warm_up + count):
        work(i)
        if i >= warm_up:
            states.append(State.now())
    return Course(states)


def answer_clips(analyzer: Any, **options: Any) -> Callable[[int], Any]:
    """The work of one clip: decode, features, answer; clips, texts and tasks in turns."""
    tasks = list(analyzer.bundle.tasks)

    def work(i: int) -> None:
        clip, text = CLIPS[i % len(CLIPS)], TEXTS[i % len(TEXTS)]
        analyzer.analyze(clip, f"{text} {i}", task=tasks[i // 2 % len(tasks)], **options)

    return work


def leaked_cells(analyzer: Any) -> int:
    """KV cells in use beside the part of the prompt that is kept: found by filling the cache."""
    from mse_runtime.errors import BackboneError

    backbone = analyzer._backbone.result()
    free = backbone.n_ctx - backbone.length(0)
    try:
        for _ in range(free):
            backbone.prefill([0], logits="none")
            free -= 1
    except BackboneError:
        return int(free)
    finally:
        analyzer.forget()
    return 0


def main() -> None:
    from mse_runtime import Analyzer

    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--bundle", default="tiny", help="default tiny")
    made.add_argument("--clips", type=int, default=2000, help="after the warm-up (default 2000)")
    made.add_argument("--warm-up", type=int, default=100, help="clips before (default 100)")
    made.add_argument("--threads", type=int, help="default: chosen by the runtime")
    made.add_argument("--out", type=Path, help="append the records to this file, as JSON lines")
    args = made.parse_args()
    write = Writer(args.out)
    write(machine())
    about = {"bundle": args.bundle, "clips": args.clips, "warm_up": args.warm_up}

    def record(case: str, number: float, unit: str, demand: str = "") -> None:
        write(value("endurance", case, number, unit, demand=demand, **about))

    with Analyzer.open(args.bundle, threads=args.threads) as analyzer:
        run = course(answer_clips(analyzer), args.clips, args.warm_up)
        leaked = leaked_cells(analyzer)
    record("growth of the resident set", run.growth / 1e6, "MB", "<= 5")
    record("highest resident set over the first", run.peak / 1e6, "MB")
    record("resident set at the end", run.states[-1].rss / 1e6, "MB")
    record("file descriptors more than at first", run.files, "", "<= 0")
    record("threads more than at first", run.threads, "", "<= 0")
    record("KV cells leaked", leaked, "", "<= 0")


if __name__ == "__main__":
    main()
