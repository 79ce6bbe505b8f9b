"""Weights as the file has them, by each of our kernels, and in llama.cpp's own layout, in turns;
and our attention beside llama.cpp's.

    python bench/layouts.py --shapes qwen-1.8b [--quants q4_0] [--quick] [--out F.jsonl]

Opening a model in a process that has llama.cpp loaded, and passes of 1 to 110 positions after 60
others. The kernels are all that this processor runs, the best one first. "llama.cpp" is its own
products and attention with the layout that it chooses for this processor (a remark names it), as
the floor of bench/latency.py: beside it stand kernels that a processor would run which has less.
"llama.cpp's attention": that one with the best of our products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from bundles import Pair, make
from common import Writer, machine, note, parse, parser, ratio, timed, timing, turns

from mse_kernels import attention, ggml, mapped
from mse_runtime.backbone import Backbone, library

BEFORE, PASSES = 60, (1, 13, 41, 110)
THEIRS, THEIR_ATTENTION = "llama.cpp", "llama.cpp's attention"


def opened(pair: Pair, threads: int | None, kernel: str | None) -> Backbone:
    return Backbone.open(pair.gguf, n_ctx=256, threads=threads, extra_bufts=kernel is None)


def opening(pair: Pair, threads: int | None, kernel: str | None) -> float:
    return timed(lambda: opened(pair, threads, kernel).close())


def one_pass(backbone: Backbone, kernel: str | None, n: int, attend: bool = True) -> float:
    mapped.use(kernel, library.folder())
    attention.use(library.attention() if kernel and attend else None, library.folder())
    backbone.truncate(0, BEFORE)
    rows = backbone.embed(np.arange(n) * 37 % backbone.n_vocab)
    return timed(lambda: backbone.prefill(rows, logits="none"))


def compare(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    kind = pair.quant.upper().removesuffix("_M")
    ours = [k for k in ggml.kernels() if kind in mapped.types_of(k, library.folder())]
    about = {"shape": pair.shape, "quant": pair.quant}
    if not ours:
        write(note("layouts", "no kernel here multiplies this type", **about))
        return
    with opened(pair, args.threads, ours[0]) as one, opened(pair, args.threads, None) as other:
        theirs = ", ".join(name for name in other.info["buffers_mib"] if name.endswith(" model"))
        write(note("layouts", f"llama.cpp's buffers are {theirs}", **about))
        cases: dict[str, Callable[[], float]] = {
            "opening, mapped": partial(opening, pair, args.threads, ours[0]),
            f"opening, {THEIRS}": partial(opening, pair, args.threads, None),
        }
        for backbone in (one, other):
            backbone.prefill(backbone.embed(np.arange(BEFORE)), logits="none")
        for n in PASSES:
            for kernel in ours:
                cases[f"{n} positions, {kernel}"] = partial(one_pass, one, kernel, n)
            if library.attention() and n > 1:
                cases[f"{n} positions, {THEIR_ATTENTION}"] = partial(
                    one_pass, one, ours[0], n, False
                )
            cases[f"{n} positions, {THEIRS}"] = partial(one_pass, other, None, n)
        samples = turns(cases, repeat=args.repeat, seconds=args.seconds)
    mapped.use(library.kernel(), library.folder())
    attention.use(library.attention(), library.folder())
    for case, found in samples.items():
        write(timing("layouts", case, found, **about))
        what, _, by = case.partition(", ")
        others = [THEIRS, *([THEIR_ATTENTION] if by == ours[0] else [])]
        for other_by in others if by in (*ours, "mapped") else ():
            if (case_of := f"{what}, {other_by}") in samples:
                write(ratio("layouts", f"{case} / {other_by}", found, samples[case_of], **about))


def main() -> None:
    made = parser(__doc__, shapes=("qwen-1.8b",))
    args = parse(made)
    write = Writer(args.out)
    write(machine())
    if not library.mapped_types():
        raise SystemExit("here llama.cpp's own products run: no Linux on x86-64, or no kernels")
    for shape in args.shapes:
        for quant in args.quants:
            compare(make(shape, quant, args.bundles), args, write)


if __name__ == "__main__":
    main()
