"""`mse-export`: a language model and an adapter become a bundle for `mse-run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from mse_export import __version__
from mse_export.watcher import Watcher
from mse_runtime.errors import MSEError

__all__ = ["main"]

EPILOG = """\b
Examples:
  mse-export --backbone llama2-7b --adapter mosei.pth            a published checkpoint
  mse-export --backbone ./Qwen2.5-0.5B --adapter ours.safetensors --quant q8_0
  mse-export --backbone model.gguf --init random -o bench        your own GGUF, untrained
  mse-export --backbone llama2-7b --synthetic --init random      7B shape, random weights

\b
Exit codes: 0 ok, 2 usage, 4 checkpoint or bundle, 5 disk or device, 6 language model.
"""


def _names() -> str:
    from mse_export.profiles import backbone_names

    return ", ".join((*backbone_names(), "tiny"))


def _list(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from mse_export import profiles
    from mse_export.quant_types import QUANTS

    click.echo("backbones: " + _names())
    for backbone, dataset in profiles.published_runs():
        click.echo(f"published: {backbone} on {dataset}")
    click.echo("quantisations: auto, " + ", ".join(QUANTS))
    context.exit(0)


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--backbone",
    required=True,
    metavar="NAME|FOLDER|FILE.gguf",
    help="A known name (see --list), a Hugging Face folder, or a GGUF file.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Adapter checkpoint: the published trainer's, or mse-train's.",
)
@click.option(
    "--init", type=click.Choice(["random"]), help="An untrained adapter, marked so, for benchmarks."
)
@click.option("--seed", default=0, show_default=True, help="Seed of --init random and --synthetic.")
@click.option(
    "--dataset",
    metavar="NAME",
    help="mosei, simsv2, cherma, meld, iemocap, or clips (raw clips). Default: guessed.",
)
@click.option(
    "--quant",
    default="auto",
    show_default=True,
    metavar="TYPE",
    help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, q3_k_m, ... (see --list).",
)
@click.option("--layout", type=click.Choice(["published", "pseudo-last"]), help="Prompt layout.")
@click.option(
    "--synthetic", is_flag=True, help="Random weights in the backbone's shape: no download."
)
@click.option(
    "--onnx-precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Weights in adapter.onnx; it computes in fp32 either way.",
)
@click.option(
    "--audio-encoder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="wav2vec 2.0 or HuBERT folder, exported into the bundle as the audio features.",
)
@click.option(
    "--face-encoder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="ResNet or CLIP folder, exported into the bundle as the face features.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle. Default: a folder here, such as llama2-7b-mosei.",
)
@click.option("--name", help="The bundle's name. Default: the folder's.")
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the reference.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--offline", is_flag=True, help="Use the local Hugging Face cache only.")
@click.option("--threads", type=click.IntRange(1), help="Threads for quantising and verifying.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Known names."
)
@click.version_option(__version__, prog_name="mse-export")
def command(as_json: bool, no_verify: bool, **options: Any) -> None:
    """Make a bundle for mse-run from a language model and an MSE-Adapter checkpoint.

    The folder appears under its name only when it is complete and verified.
    """
    with _Display() as display:
        display.stage("Loading PyTorch")
        from mse_export.pipeline import Request, export

        request = Request(verify=not no_verify, **options)
        result = export(request, display)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    bundle = result.bundle
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bundle": str(result.path),
                    "name": bundle.name,
                    "trained": bundle.trained,
                    "gguf": bundle.backbone.gguf.type,
                    "gguf_bytes": bundle.backbone.gguf.size,
                    "parity": bundle.parity,
                    "warnings": list(result.warnings),
                },
                ensure_ascii=False,
            )
        )
        return
    click.echo(str(result.path))


class _Display(Watcher):
    """Stages and a byte progress bar on stderr; quiet lines where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def stage(self, text: str) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=None)
        if not self._console.is_terminal:
            print(f"{text} ...", file=sys.stderr, flush=True)

    def progress(self, done: int, total: int) -> None:
        if self._task is not None:
            # The last step is shown even where the whole was faster than the bar is drawn.
            self._bars.update(self._task, completed=done, total=total, refresh=done >= total)

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)


def main() -> None:
    """Entry point: errors meant for people become one paragraph and an exit code."""
    try:
        command(standalone_mode=False)
    except MSEError as error:
        click.echo(f"mse-export: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "mse-export: interrupted. Nothing was left under the bundle's name; run the same "
            "command again (a conversion goes on where it stopped, random weights start anew).",
            err=True,
        )
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
