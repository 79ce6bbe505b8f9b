"""`mse-train`: from clips or a published data set to an adapter's checkpoint."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mse_export.training.progress import console_reporter
from mse_runtime import background
from mse_runtime.datasets import load_dataset
from mse_runtime.errors import MSEError, UsageError

if TYPE_CHECKING:
    from mse_export.training.run import Result

__all__ = ["main", "mse_train"]

EPILOG = """\b
Examples:
  mse-train prepare clips.csv -o data/
  mse-train --backbone tiny --dataset mine --data data/ -o mine.safetensors
  mse-train --backbone ./Llama-2-7b-hf --dataset mosei --data unaligned_50.pkl \\
            --layout published -o mosei.safetensors --seed 1111 --seed 2222
  mse-train tiny

\b
A killed or interrupted run goes on where it stopped: give the same command again.
Exit codes: 0 ok, 2 usage, 3 bad data, 4 bad bundle, 5 device or memory, 6 backbone,
130 interrupted.
"""


@click.group(
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--backbone",
    help="A Hugging Face folder, a name of `mse-export --list`, or the built-in `tiny`.",
)
@click.option("--dataset", help="mosei, simsv2, meld, cherma, iemocap, or a name for your own.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="A pickle, a folder, a CSV or an .npz."
)
@click.option(
    "--layout",
    type=click.Choice(["published", "pseudo-last"]),
    default="pseudo-last",
    show_default=True,
    help="Where the pseudo tokens stand. `published` with a published data set is the paper's run.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The checkpoint: .safetensors, or .pth in the published trainer's format.",
)
@click.option("--seed", "seeds", type=int, multiple=True, help="Repeat for several runs.")
@click.option("--epochs", type=click.IntRange(min=1), help="At most this many.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples in a step (default: recipe).")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate.")
@click.option("--early-stop", type=click.IntRange(min=1), help="Epochs without improvement.")
@click.option("--n-pseudo", type=click.IntRange(1, 64), help="Pseudo tokens (default: profile).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the frozen language model; the adapter is always fp32.",
)
@click.option("--4bit", "four_bit", is_flag=True, help="NF4 backbone (GPU, bitsandbytes).")
@click.option(
    "--checkpointing",
    is_flag=True,
    help="Recompute activations: less memory, slower (done by itself when memory runs out).",
)
@click.option(
    "--parity",
    type=click.Choice(["published"]),
    help="Round rotary tables and format labels exactly as the published trainer does.",
)
@click.option("--skip-bad", is_flag=True, help="Leave rows that cannot be used out.")
@click.option("--fresh", is_flag=True, help="Forget an earlier run at the same output.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def mse_train(context: click.Context, /, **options: Any) -> None:
    """Train an adapter against a frozen language model.

    State, curves and a plot go to OUTPUT.train/ after every epoch; the best adapter so far is
    always at OUTPUT.
    """
    if context.invoked_subcommand is not None:
        return
    missing = [name for name in ("backbone", "dataset", "data", "output") if not options[name]]
    if missing:
        flags = ", ".join("-o" if name == "output" else f"--{name}" for name in missing)
        raise UsageError(f"Missing {flags}. See mse-train --help for examples.")
    _need_torch()
    if not options["data"].exists():
        load_dataset(options["data"], options["dataset"])  # says so before PyTorch is loaded
    _loading()
    from mse_export.training.run import Arguments, train

    if options["threads"]:
        import torch

        torch.set_num_threads(options["threads"])
    arguments = Arguments(
        backbone=options["backbone"],
        dataset=options["dataset"],
        data=options["data"],
        output=options["output"],
        layout=options["layout"],
        seeds=options["seeds"] or (1111,),
        epochs=options["epochs"],
        batch=options["batch"],
        lr=options["lr"],
        early_stop=options["early_stop"],
        n_pseudo=options["n_pseudo"],
        device=options["device"],
        precision=options["precision"],
        four_bit=options["four_bit"],
        checkpointing=options["checkpointing"],
        parity=options["parity"] == "published",
        skip_bad=options["skip_bad"],
        fresh=options["fresh"],
    )
    with console_reporter() as reporter:
        results = train(arguments, reporter)
    _print_results(results, arguments.output, options["as_json"])


@mse_train.command("prepare")
@click.argument("clips", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder for features, manifest.csv and dataset.json.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Clips at a time (default: all cores).")
@click.option("--task", type=click.Choice(["regression", "classification"]), help="If not guessed.")
@click.option("--labels", help="Classes in order, comma-separated (default: those in the CSV).")
@click.option("--range", "ends", help="Ends of the scale, such as -1,1 (default: -3,3 or -1,1).")
@click.option("--audio-spec", default="lld13/1", show_default=True)
@click.option("--face-spec", default="face167/1", show_default=True)
@click.option("--fps", type=click.FloatRange(min=0, min_open=True, max=60))
def prepare_command(clips: Path, output: Path, **options: Any) -> None:
    """Extract the features of the clips in a CSV.

    CLIPS has the columns clip, text, label and optionally id, split, speaker, start, end; clips
    are relative to the CSV. Finished clips are not read again, so the same command goes on after a
    kill. A clip that cannot be read is listed in problems.csv and left out (exit code 3).
    """
    from dataclasses import replace

    from mse_export.training.prepare import describe, prepare
    from mse_runtime.features.spec import get_spec

    for spec in (options["audio_spec"], options["face_spec"]):
        get_spec(spec)
    info = describe(clips, options["task"], _names(options["labels"]), _ends(options["ends"]))
    info = replace(info, audio_spec=options["audio_spec"], face_spec=options["face_spec"])
    jobs = options["jobs"] or background.cores()
    with console_reporter() as reporter:
        result = prepare(
            clips,
            output,
            info,
            jobs=jobs,
            fps=options["fps"],
            step=lambda done, total: reporter.step("clips", done, total),
        )
    splits = ", ".join(f"{count} {name}" for name, count in result.splits.items())
    click.echo(f"{output}: {result.rows} clips ({splits}), {result.made} of them new.")
    if result.interrupted:
        click.echo("Interrupted. What was done is kept: the same command goes on.", err=True)
        sys.exit(130)
    if result.problems:
        from mse_runtime.datasets import summary

        click.echo(
            f"{len(result.problems)} rows are left out (all of them in {output}/problems.csv):\n"
            + summary(result.problems),
            err=True,
        )
        sys.exit(3)


class _LazyTiny(click.Command):
    """`mse-train tiny`, imported when it is called: it brings its own options."""

    def _real(self) -> click.Command:
        _need_torch()
        from mse_export.training.tiny.cli import tiny  # light: PyTorch comes with the first stage

        found: click.Command = tiny
        return found

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return self._real().make_context(*args, **kwargs)

    def get_short_help_str(self, limit: int = 45) -> str:
        return "Make the built-in bundle from nothing."


mse_train.add_command(_LazyTiny("tiny"))


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _ends(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UsageError(f"--range {text!r} should be two numbers, such as -1,1.") from None
    if not low < high:
        raise UsageError(f"--range {text!r} should begin with the lower end.")
    return low, high


def _need_torch() -> None:
    import importlib.util

    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        raise UsageError(
            f"Training needs {' and '.join(missing)}, which are not installed: "
            "pip install 'mse-runtime[export]'"
        )


def _loading() -> None:
    """Say at once that something happens; gone with the first line of the reporter."""
    click.echo("mse-train: loading PyTorch ...", err=True)


def _print_results(results: Sequence[Result], output: Path, as_json: bool) -> None:
    from mse_export.training.run import summary_rows

    if as_json:
        document = {
            "checkpoint": str(output),
            "runs": [
                {
                    "seed": r.seed,
                    "checkpoint": str(r.checkpoint),
                    "epochs": r.outcome.epochs,
                    "best_epoch": r.outcome.best_epoch,
                    "stopped": r.outcome.stopped,
                    "validation": {r.outcome.metric: r.outcome.best},
                    "test": {k: None if math.isnan(v) else v for k, v in r.test.items()},
                }
                for r in results
            ],
        }
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    for r in results:
        click.echo(
            f"seed {r.seed}: best validation {r.outcome.metric} {r.outcome.best:.4f} in epoch "
            f"{r.outcome.best_epoch} of {r.outcome.epochs} ({r.outcome.stopped})"
        )
    for name, (mean, spread) in summary_rows(results).items():
        tail = "" if math.isnan(spread) else f" +- {spread:.4f}"
        click.echo(f"test {name:16s} {mean:.4f}{tail}")
    click.echo(f"{output}")


def main() -> None:
    """Entry point: MSEErrors become one paragraph and an exit code."""
    try:
        mse_train.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        _interrupted()
    except KeyboardInterrupt:
        _interrupted()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except MSEError as error:
        click.echo(f"mse-train: {error}", err=True)
        sys.exit(error.exit_code)


def _interrupted() -> None:
    click.echo("\nInterrupted. Every finished epoch is kept: the same command goes on.", err=True)
    sys.exit(130)


if __name__ == "__main__":
    main()
