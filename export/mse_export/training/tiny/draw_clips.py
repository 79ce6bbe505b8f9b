"""The drawing process of `mse-train tiny`: `python -m ... WORK SCALE WORKERS`.

Apart from the language model's process, so that both of a small machine's cores have work. Whatever
is finished stays; started again, it goes on with the next shard.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from pathlib import Path

__all__ = ["main"]


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(work: Path, scale: str, workers: int) -> None:
    """Features of the validation and training clips, then every kind of test clips as .mp4."""
    from mse_export.training.tiny.clips import render_all, write_all
    from mse_export.training.tiny.portrait import Person
    from mse_export.training.tiny.workspace import SCALES, Run

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    run = Run(work=work, out=work, scale=SCALES[scale])
    for split in ("valid", "train"):
        render_all(run.specs(split), work / "clips", split, workers=workers)
    for split in ("test", "faint"):
        write_all(run.specs(split), work / split)
    write_all(run.specs("portrait"), work / "portrait", functools.cache(Person))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
