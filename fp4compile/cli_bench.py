"""`fp4compile bench`: verifies operators and layers on this machine, then times them beside their peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_WHAT = ("matmul", "grouped", "quantize", "layer", "all")
_ENDS = """Results go to FOLDER/bench.json case by case, with bench.md and speed.svg; the same command continues a run that was stopped.
Exit code 1: something is wrong, or did not run. It is named, and nothing wrong is timed."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="verify kernels and layers, then time them beside bf16, int4 and others", epilog=_ENDS)
    parser.add_argument("what", nargs="?", choices=_WHAT, default="all", help="default: %(default)s")
    parser.add_argument("--shapes", type=_shapes, metavar="NxK,...", help="weights of products, tensors to quantize")
    parser.add_argument("--rows", type=_numbers, metavar="M,...", help="rows of x in products, of all groups together")
    parser.add_argument("--groups", type=int, metavar="G", help="weights of grouped products, as experts")
    parser.add_argument("--format", action="append", choices=["nvfp4", "mxfp4"], help="may be repeated")
    parser.add_argument("--activation", action="append", choices=["bf16", "fp4"], help="W4A16, W4A4; may be repeated (default: both)")
    parser.add_argument("--peers", type=_peers, metavar="NAME,...", help="compiled bf16, int4, gemlite, torchao (default: all), or none")
    parser.add_argument("--model", help="size of the decoder layers: tiny, 135m, 1b, 8b, 70b")
    parser.add_argument("--layers", type=int, help="how many of them")
    parser.add_argument("--policy", action="append", choices=["nvfp4", "nvfp4_a16"], help="of layers; may be repeated (default: both)")
    parser.add_argument("--phase", action="append", choices=["decode", "prefill"], help="of layers; may be repeated (default: both)")
    parser.add_argument("--mode", action="append", choices=["default", "reduce-overhead"], help="likewise, of torch.compile")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep results there, and go on from what is there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="few small cases, to see that everything runs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fp4compile.bench.run import Request
    from fp4compile.bench.run import run as run_bench
    from fp4compile.bench.table import as_text

    request = Request.of(args)
    results = run_bench(request, args.out)
    print(results.to_json() if args.json else as_text(results))
    bad = [row for row in results.rows.values() if not row.is_good]
    if bad:
        print(f"fp4compile bench: {len(bad)} of {len(results.rows)} cases are wrong or did not run", file=sys.stderr)
    return 1 if bad else 0


def _shapes(text: str) -> list[tuple[int, int]]:
    return [_shape(part) for part in text.split(",")]


def _shape(text: str) -> tuple[int, int]:
    sizes = _numbers(text.replace("x", ","))
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it as in 28672x8192")
    return sizes[0], sizes[1]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} holds something else than whole numbers") from error
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are at least 1")
    return numbers


def _peers(text: str) -> list[str]:
    from fp4compile.bench.peers import PEERS
    from fp4compile.codegen.errors import UnknownName

    names = [] if text == "none" else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(str(UnknownName(what="peer", found=name, valid=PEERS)))
    return names
