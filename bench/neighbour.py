"""A warm answer beside a busy neighbour: how much slower, and is that in proportion?

    python bench/neighbour.py --shapes tiny [--out F.jsonl]

The neighbour is another process that computes without pause, one for each core. A fair scheduler
then leaves us half of the machine, so about twice the time is in proportion; threads that spin or
wait for each other at barriers would show as ten times and more.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time

from bundles import Pair, make
from common import Writer, machine, parse, parser, ratio, timing

BUSY = "x = 1\nwhile True: x = x * 3 % 1000003"


def beside(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """Answers alone and beside the neighbours, which are stopped and continued in turns."""
    from engine import Engine

    from mse_runtime import background

    engine = Engine(pair, args.threads)
    cores = background.cores()
    crowd = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores)]
    alone: list[float] = []
    busy: list[float] = []
    try:
        for neighbour in crowd:
            neighbour.send_signal(signal.SIGSTOP)
        engine.published.answer()
        begun = time.perf_counter()
        for turn in range(args.repeat):
            if turn >= 3 and time.perf_counter() - begun > args.seconds:
                break
            alone.append(engine.published.answer())
            for neighbour in crowd:
                neighbour.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            busy.append(engine.published.answer())
            for neighbour in crowd:
                neighbour.send_signal(signal.SIGSTOP)
    finally:
        for neighbour in crowd:
            neighbour.kill()
            neighbour.wait()
        engine.close()
    about = {"shape": pair.shape, "quant": pair.quant, "threads": engine.threads}
    write(timing("neighbour", "answer, alone", alone, **about))
    write(timing("neighbour", f"answer, beside {cores} busy processes", busy, **about))
    write(ratio("neighbour", "beside busy neighbours / alone", busy, alone,
                **about))  # fmt: skip


def main() -> None:
    args = parse(parser(__doc__))
    write = Writer(args.out)
    write(machine())
    for shape in args.shapes:
        for quant in args.quants if shape != "tiny" else ["f16"]:
            beside(make(shape, quant, args.bundles), args, write)


if __name__ == "__main__":
    main()
