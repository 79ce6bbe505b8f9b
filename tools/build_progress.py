"""Turn `pip install -v` of a compiled package into one progress line.

    pip install -v PACKAGE 2>&1 | python tools/build_progress.py LOG

Everything read goes to LOG; lines of ninja or make such as `[12/140] Building CXX object ...`
become progress on stderr: one rewritten line on a terminal, a line every tenth elsewhere.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

STEP = re.compile(r"\[\s*(\d+)/(\d+)\]\s+(.*)")


def main(log: Path) -> None:
    started, shown, terminal = time.monotonic(), -1, sys.stderr.isatty()
    with log.open("w", encoding="utf-8", errors="replace") as record:
        for line in sys.stdin:
            record.write(line)
            if not (found := STEP.search(line)):
                continue
            done, total = int(found[1]), int(found[2])
            tenth = 10 * done // max(total, 1)
            spent = time.monotonic() - started
            text = f"compiling {done}/{total} steps, {spent:.0f} s"
            if terminal:
                print(f"\r{text} ", end="", file=sys.stderr, flush=True)
            elif tenth != shown:
                print(text, file=sys.stderr, flush=True)
            shown = tenth
    if terminal and shown >= 0:
        print(file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
