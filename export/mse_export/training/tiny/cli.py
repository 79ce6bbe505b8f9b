"""`mse-train tiny`: make the built-in bundle."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from mse_export.training.tiny.pipeline import STAGES, execute
from mse_export.training.tiny.workspace import SCALES, Run

__all__ = ["tiny"]


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("tiny-bundle"),
    show_default=True,
    help="Folder of the bundle.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("tiny-work"),
    show_default=True,
    help="Folder of everything between the stages; a killed run goes on from it.",
)
@click.option(
    "--scale",
    type=click.Choice(list(SCALES)),
    default="full",
    show_default=True,
    help="`small` goes through every stage in under a minute and learns nothing.",
)
@click.option(
    "--until",
    type=click.Choice(list(STAGES)),
    default="card",
    show_default=True,
    help="Stop after this stage; `ablate` takes as long as the rest again.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that draw clips, beside the one that trains.",
)
@click.option(
    "--meld",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with MELD's dev_sent_emo.csv and test_sent_emo.csv, only to report on.",
)
@click.option(
    "--real-clips",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of clips of real people to report on.",
)
def tiny(
    out: Path,
    work: Path,
    scale: str,
    until: str,
    threads: int,
    workers: int,
    meld: Path | None,
    real_clips: Path | None,
) -> None:
    """Make the built-in bundle `tiny` from words and drawings: no data set, no download.

    Needs the program espeak-ng. The stages are: vocabulary, text, slots (the language model),
    clips (drawn and spoken, through the runtime's extractors), adapter, bundle, evaluate (on new
    people, voices and sentences, rendered to .mp4, through the runtime), card; and, when asked for,
    ablate. Clips are drawn while the language model is trained.

    \b
    Examples:
      mse-train tiny -o tiny-bundle --threads 2
      mse-train tiny --scale small -o /tmp/bundle --work /tmp/work
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    run = Run(work, out, SCALES[scale], text_data=meld, real_clips=real_clips)
    execute(run, until=until, threads=threads, workers=workers)
    click.echo(str(out))
