"""`mse-run`: parse, call, print. The result goes to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mse_runtime import __version__
from mse_runtime.errors import MSEError, UsageError

if TYPE_CHECKING:
    from mse_runtime.analyzer import Analyzer
    from mse_runtime.features.pool import FeaturePool
    from mse_runtime.features.spec import Features
    from mse_runtime.result import Prediction

__all__ = ["main", "run"]

EPILOG = """\b
Examples:
  mse-run clip.mp4 "I really love it"
  mse-run clip.mp4 "I really love it" --task emotion --json
  mse-run clip.mp4 "I really love it" --start 12.5 --end 16 --plot answer.png
  mse-run --features clip.npz "I really love it" --bundle ./my-bundle
  mse-run clip.mp4 --features-only -o clip.npz
  mse-run --batch clips.csv -o answers.jsonl
  mse-run --plan --bundle ./llama2-7b-mosei

\b
Exit codes: 0 ok, 1 some rows of a batch failed, 2 usage, 3 bad media, 4 bad bundle,
5 device or memory, 6 backbone, 130 interrupted.
"""


MODEL = frozenset(
    ["bundle", "task", "threads", "n_gpu_layers", "require_gpu", "low_memory", "adapter", "parity"]
)
WINDOW = frozenset(["start", "end", "max_seconds", "fps"])
ANSWER = MODEL | {"as_json", "jsonl", "plan"}
EVERYWHERE = frozenset(["arguments", "verbose", "offline"])
MEANT_FOR = {
    "a clip": ANSWER | WINDOW | {"plot"},
    "--features": ANSWER | {"features"},
    "--batch": MODEL
    | frozenset(["batch", "output", "workers", "clip_timeout", "clip_memory", "retry"])
    | {"fps", "max_seconds"},
    "--features-only": WINDOW | {"features_only", "bundle", "threads", "output"},
    "--plan alone": frozenset(["plan", "bundle", "n_gpu_layers", "low_memory", "require_gpu"]),
    "--explain-features": frozenset({"explain_features", "bundle"}),
}


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("arguments", nargs=-1, metavar="[CLIP] [TEXT]")
@click.option(
    "--bundle",
    default="tiny",
    show_default=True,
    help="Built-in name, folder, or org/repo[@revision] on the Hugging Face hub.",
)
@click.option("--task", help="One of the bundle's tasks (default: the bundle's own default).")
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Use these features (audio [T, da], video [T, dv]) instead of a clip.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--jsonl", is_flag=True, help="Print the result as one line of JSON.")
@click.option(
    "--parity",
    type=click.Choice(["published"]),
    help="Generate greedily and parse as the published code does.",
)
@click.option("--start", type=click.FloatRange(min=0), help="Begin here (seconds).")
@click.option("--end", type=click.FloatRange(min=0), help="Stop here (seconds).")
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Longest stretch to read.",
)
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True, max=60),
    help="Face features per second (default: the bundle's feature spec).",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads (default: physical cores; 1 for small models).",
)
@click.option(
    "--n-gpu-layers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Layers on the GPU (default: what the memory plan says).",
)
@click.option("--require-gpu", is_flag=True, help="Fail where no GPU is used.")
@click.option(
    "--low-memory",
    is_flag=True,
    help="Keep the weights as the mapped file: no repacked copy, slower where there is one. Read "
    "the clip in this process.",
)
@click.option(
    "--adapter",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "onnx", "kernels-cpu", "kernels-cuda", "numpy"]),
    help="Which implementation runs the adapter.",
)
@click.option(
    "--plan",
    is_flag=True,
    help="Print the memory plan before loading, and the measurement afterwards. "
    "Without a clip: the plan alone.",
)
@click.option("--features-only", is_flag=True, help="Write the features to -o FILE.npz and stop.")
@click.option(
    "--explain-features",
    is_flag=True,
    help="Print the columns of the bundle's feature specs, or of the specs named.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT.png",
    help="Draw frames, mesh, pitch, loudness and the answer on one timeline.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where --features-only (.npz) and --batch (.jsonl, .csv, .parquet) write.",
)
@click.option(
    "--batch",
    type=click.Path(path_type=Path),
    metavar="LIST",
    help="Answer for every row of a .csv, .tsv or .jsonl (clip, text), or every clip of a folder "
    "with its .txt; goes on where it stopped. Needs -o.",
)
@click.option("--retry", is_flag=True, help="Do the rows of a batch again that had an error.")
@click.option("--workers", type=click.IntRange(1, 64), help="Feature processes of a batch.")
@click.option(
    "--clip-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds one clip of a batch may take.",
)
@click.option(
    "--clip-memory",
    type=click.IntRange(min=256),
    default=2048,
    show_default=True,
    help="Address space of a feature process in MiB.",
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@click.version_option(__version__, prog_name="mse-run")
@click.pass_context
def run(context: click.Context, /, arguments: tuple[str, ...], **options: Any) -> None:
    """The sentiment or emotion of a person in CLIP who says TEXT.

    CLIP is any audio or video file; TEXT is what is said in it. Everything runs offline on this
    machine. The result goes to stdout, progress and warnings to stderr.
    """
    if options["verbose"]:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    modes = {
        "--explain-features": options["explain_features"],
        "--batch": options["batch"],
        "--features-only": options["features_only"],
        "--plan alone": options["plan"] and not arguments,
        "--features": options["features"],
    }
    mode = next((name for name, chosen in modes.items() if chosen), "a clip")
    _check_options(mode, context)
    commands = {
        "--explain-features": _explain,
        "--batch": _batch,
        "--features-only": _features_only,
        "--plan alone": _plan_only,
    }
    _check_outputs(arguments, options)
    commands.get(mode, partial(_answer, finish=context.obj))(arguments, options)


def _check_options(mode: str, context: click.Context) -> None:
    """Refuse options that would do nothing: an ignored option is a wrong answer."""
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    idle = given - EVERYWHERE - MEANT_FOR[mode]
    if {"as_json", "jsonl"} <= given:
        raise UsageError("Give --json or --jsonl, not both.")
    if idle:
        names = ", ".join("--" + n.removeprefix("as_").replace("_", "-") for n in sorted(idle))
        raise UsageError(f"{names} has no meaning with {mode}. Leave it out; see mse-run --help.")


def _check_outputs(arguments: tuple[str, ...], options: dict[str, Any]) -> None:
    """Refuse what could not be written at the end, or over what is read, before all else."""
    read = [*arguments, *filter(None, (options["features"], options["batch"]))]
    for path in filter(None, (options["plot"], options["output"])):
        if not path.absolute().parent.is_dir():
            raise UsageError(f"There is no folder {path.parent} for {path.name}: make it first.")
        if any(_is_file(word) and path.exists() and path.samefile(word) for word in read):
            raise UsageError(f"{path} is what is read: name another file to write.")
    if options["features_only"] and options["output"] and options["output"].suffix != ".npz":
        raise UsageError(f"Features are written as .npz, not {options['output'].name}.")
    if options["plot"]:
        from mse_runtime.plot import check_plot

        check_plot(options["plot"])


def _answer(
    arguments: tuple[str, ...], options: dict[str, Any], finish: Callable[[], None] | None
) -> None:
    wanted = 1 if options["features"] else 2
    if len(arguments) > wanted:
        if options["features"] and _is_file(arguments[0]):
            raise UsageError("Give a clip or --features, not both.")
        raise UsageError('Put the text in quotes: mse-run clip.mp4 "what is said in it".')
    if len(arguments) != wanted:
        raise UsageError(
            'Give the text alone with --features: mse-run --features f.npz "what is said".'
            if options["features"]
            else 'Give a clip and its text: mse-run clip.mp4 "what is said". See mse-run --help.'
        )
    text = arguments[-1]
    clip = None if options["features"] else Path(arguments[0])
    if clip and _is_file(text) and not _is_file(arguments[0]):
        raise UsageError(f"{text} is a file: give the clip first, then the text.")
    with _reader(options) if clip else nullcontext() as pool:
        from mse_runtime.prompt import check_text

        check_text(text)
        # What `--parity` generates takes the whole vocabulary.
        with _open(options, pool, () if options["parity"] else (text,)) as analyzer:
            if options["plan"]:
                _print_plan(analyzer.plan.rows(), "Memory plan", sys.stderr)
            common = {"task": options["task"], "parity": options["parity"]}
            if clip is None:
                features = _load_features(options["features"])
                prediction = analyzer.analyze_features(features, text, **common)
            else:
                window = {name: options[name] for name in sorted(WINDOW)}
                keep = 8 if options["plot"] else 0
                prediction = analyzer.analyze(clip, text, **common, **window, keep_frames=keep)
            _report(analyzer, prediction, options)
            if pool is not None:
                pool.retire()
            if finish is not None:  # the system frees a model faster than we would
                finish()


def _is_file(word: str | Path) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # a text is often longer than a name may be
        return False


def _report(analyzer: Analyzer, prediction: Prediction, options: dict[str, Any]) -> None:
    for warning in prediction.warnings:
        click.echo(f"warning: {warning}", err=True)
    if options["jsonl"]:
        click.echo(json.dumps(prediction.to_dict(), ensure_ascii=False))
    elif options["as_json"]:
        click.echo(json.dumps(prediction.to_dict(), ensure_ascii=False, indent=2))
    else:
        from rich.console import Console

        from mse_runtime.render import print_prediction

        print_prediction(prediction, analyzer.task(prediction.task)[1], Console(highlight=False))
    if options["plan"]:
        memory = prediction.memory_mb
        rows = analyzer.plan.rows(
            memory["peak_rss"] or 0.0,
            memory["vram"],
            prediction.backend["backbone"]["buffers_mib"],
        )
        _print_plan(rows, "Planned and measured", sys.stderr)
    if options["plot"]:
        from mse_runtime.plot import plot_prediction

        plot_prediction(analyzer.last_features, prediction.to_dict(), options["plot"])
        click.echo(f"picture: {options['plot']}", err=True)


def _batch(arguments: tuple[str, ...], options: dict[str, Any]) -> None:
    from mse_runtime.batch.command import run_batch

    if arguments or not options["output"]:
        raise UsageError("Give the list and where to write: mse-run --batch clips.csv -o out.jsonl")
    with _open(options) as analyzer:
        code = run_batch(analyzer, options["batch"], options["output"], options)
    if code:
        leave(code)


def _features_only(arguments: tuple[str, ...], options: dict[str, Any]) -> None:
    from mse_runtime.bundle import load_bundle
    from mse_runtime.bundle.hub import resolve_bundle
    from mse_runtime.features.extract import extract, save_npz

    if len(arguments) != 1 or not options["output"]:
        raise UsageError(
            "Give one clip and where to write: mse-run clip.mp4 --features-only -o f.npz"
        )
    clip = Path(arguments[0])
    folder = resolve_bundle(options["bundle"], offline=options["offline"])
    bundle = load_bundle(folder, offline=options["offline"])
    features = extract(
        clip,
        audio_spec=bundle.features.audio.spec,
        face_spec=bundle.features.face.spec,
        fps=options["fps"],
        start=options["start"],
        end=options["end"],
        max_seconds=options["max_seconds"],
        threads=options["threads"],
        bundle=bundle,
    )
    for warning in features.warnings:
        click.echo(f"warning: {warning}", err=True)
    save_npz(options["output"], features)
    for name, track in (("audio", features.audio), ("face", features.face)):
        shape = "missing" if track is None else f"{track.spec}, {track.values.shape}"
        click.echo(f"{name}: {shape}")


def _explain(arguments: tuple[str, ...], options: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mse_runtime.bundle import load_bundle
    from mse_runtime.bundle.hub import resolve_bundle
    from mse_runtime.features.spec import get_spec, known_specs

    names = arguments
    if not names:
        folder = resolve_bundle(options["bundle"], offline=options["offline"])
        inputs = load_bundle(folder, offline=options["offline"]).features
        names = (inputs.audio.spec, inputs.face.spec)
    console = Console()
    for name in names:
        spec = get_spec(name)
        table = Table("column", "unit", "fidelity", "note", title=f"{spec.id}: {spec.description}")
        for column in spec.columns:
            table.add_row(column.name, column.unit, column.fidelity, column.note)
        console.print(table)
    others = ", ".join(name for name in known_specs() if name not in names)
    console.print(f"Others: {others}. For one of them: mse-run --explain-features openface177/1")


def _plan_only(_arguments: tuple[str, ...], options: dict[str, Any]) -> None:
    from mse_runtime.bundle import load_bundle
    from mse_runtime.bundle.hub import resolve_bundle
    from mse_runtime.sizing import make_plan

    folder = resolve_bundle(options["bundle"], offline=options["offline"])
    bundle = load_bundle(folder, offline=options["offline"])
    plan = make_plan(
        bundle,
        n_gpu_layers=options["n_gpu_layers"],
        low_memory=options["low_memory"],
        require_gpu=options["require_gpu"],
        feature_process=_reads_apart(options),
    )
    _print_plan(plan.rows(), f"Memory plan of {bundle.name}", sys.stdout)


def _reads_apart(options: dict[str, Any]) -> bool:
    """Whether a process beside reads the clip: not where it would only take turns with this one,
    where memory is short, or for a plot, whose pictures stay here."""
    from mse_runtime.features.child import can_help

    return can_help() and not options["low_memory"] and not options["plot"]


def _reader(options: dict[str, Any]) -> AbstractContextManager[FeaturePool | None]:
    """The process that reads the clip, on its way before anything large is imported here."""
    if not _reads_apart(options):
        return nullcontext()
    from mse_runtime.features.pool import FeaturePool

    pool = FeaturePool(once=True, verbose=options["verbose"])
    try:
        pool.start()
    except OSError:  # no more processes: then this one reads it
        pool.close()
        return nullcontext()
    return pool


def _open(
    options: dict[str, Any], pool: FeaturePool | None = None, texts: Sequence[str] = ()
) -> Analyzer:
    from mse_runtime.analyzer import Analyzer

    return Analyzer.open(
        options["bundle"],
        threads=options["threads"],
        n_gpu_layers=options["n_gpu_layers"],
        low_memory=options["low_memory"],
        adapter=options["adapter"],
        require_gpu=options["require_gpu"],
        offline=options["offline"],
        texts=texts,
        pool=pool,
    )


def _load_features(path: Path) -> Features:
    from mse_runtime.features.extract import load_npz

    return load_npz(path)


def _print_plan(rows: list[tuple[str, ...]], title: str, stream: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    head, *body = rows
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in body:
        table.add_row(*row)
    Console(file=stream).print(table)


def main() -> None:
    """Entry point: errors become one paragraph on stderr and the documented exit code."""
    # This process is ours: NumPy sees small matrices only, and its BLAS workers would just spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        run(standalone_mode=False, obj=_finish)
        _finish()
    except MSEError as error:
        leave(error.exit_code, f"mse-run: {error}")
    except click.ClickException as error:
        error.show()
        leave(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        leave(130, "mse-run: interrupted")
    except BrokenPipeError:
        leave(0)
    except RuntimeError as error:
        if "start new thread" not in str(error):  # Python has no class of its own for it
            raise
        leave(
            5, "mse-run: the system allows no more threads: end other programs, or raise ulimit -u."
        )
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            raise
        leave(5, "mse-run: the answer could not be written: no space left.")


def _finish() -> None:
    """The end where all went well: without taking the interpreter apart, which takes a while.

    A kept prefix that is still being written is waited for.
    """
    _flush()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    os._exit(0)


def leave(code: int, message: str | None = None) -> NoReturn:
    """Exit now, not when a model that is still loading in another thread has loaded."""
    if message:
        click.echo(message, err=True)
    with suppress(OSError):
        _flush()
    os._exit(code)


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the shell closed it
        stream.flush()


if __name__ == "__main__":
    main()
