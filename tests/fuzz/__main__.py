"""Run one fuzzer: `python -m tests.fuzz gguf --minutes 60`.

Atheris (libFuzzer) mutates the seeds, guided by the coverage of this project's Python; FFmpeg's C
is not instrumented, so `media` is mutation alone. What is interesting is kept in the corpus, what
breaks the promise of `targets` becomes a new seed in tests/fixtures/fuzz, to be committed together
with the cure.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALL = ("gguf", "manifest", "features", "rows", "journal", "media", "pickle")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", help=f"{', '.join(ALL)} or all")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--replay", action="store_true", help="only the seeds; needs no atheris")
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--finds", type=Path, help="default: tests/fixtures/fuzz")
    wanted = parser.parse_args()
    if wanted.target == "all":
        rest = sys.argv[1:]
        rest.remove("all")
        command = [sys.executable, "-m", "tests.fuzz"]
        sys.exit(max(subprocess.call([*command, name, *rest], cwd=ROOT) for name in ALL))
    for name in (".", "export", "kernels", "tests"):
        sys.path.insert(0, str(ROOT / name))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # millions of small files
    with tempfile.TemporaryDirectory(prefix="mse-fuzz-", dir=memory) as made:
        os.environ.setdefault("MSE_CACHE", f"{made}/cache")
        if wanted.replay:
            replay(wanted.target, Path(made))
        else:
            fuzz(wanted, Path(made))


def replay(name: str, made: Path) -> None:
    """Every seed once, in this process."""
    from fuzz.seeds import FINDS, seeds
    from fuzz.targets import MEGABYTES, TARGETS
    from mse_runtime.errors import MSEError

    found = [*seeds(name, made)]
    found += [(p.name, p.read_bytes()) for p in sorted((FINDS / name).glob("*"))]
    for label, data in found:
        print(f"{name}: {label}", file=sys.stderr, flush=True)
        try:
            TARGETS[name].call(data, made)
        except MSEError:
            continue
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    assert peak < MEGABYTES, f"the seeds took {peak} MB"
    print(f"{len(found)} seeds, peak {peak} MB")


def fuzz(wanted: argparse.Namespace, made: Path) -> None:
    """Does not return: libFuzzer ends the process, with a status other than 0 after a find."""
    import atheris

    with atheris.instrument_imports(include=["mse_runtime"]):
        from fuzz.targets import MEGABYTES, SECONDS, TARGETS

    from fuzz.seeds import FINDS, seeds, words
    from mse_runtime.errors import MSEError

    target = TARGETS[wanted.target]
    corpus, finds = wanted.corpus / wanted.target, (wanted.finds or FINDS) / wanted.target
    good, folder = made / "seeds", made / "files"
    for path in (corpus, finds, good, folder):
        path.mkdir(parents=True, exist_ok=True)
    for label, data in seeds(wanted.target, folder):
        (good / label).write_bytes(data)
    words_file = made / "words"
    words_file.write_text(
        "".join('"' + "".join(f"\\x{b:02x}" for b in w) + '"\n' for w in words(wanted.target))
    )

    def one(data: bytes) -> None:
        try:
            target.call(data, folder)
        except MSEError:
            return

    options = {
        "max_total_time": round(wanted.minutes * 60),
        "timeout": SECONDS,
        "rss_limit_mb": MEGABYTES,
        "max_len": target.max_bytes,
        "artifact_prefix": f"{finds}/",
        "dict": words_file,
        "print_final_stats": 1,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, *map(str, (corpus, good, finds))], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
