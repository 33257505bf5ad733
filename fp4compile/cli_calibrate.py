"""`fp4compile calibrate`: collect what the layers of a model read, for a model that a Python file builds."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from fp4compile.cli_explain import load_model
from fp4compile.codegen.errors import Fp4CompileError


class NoBatchesThere(Fp4CompileError, ValueError):
    template = "--batches {given!r}: {found}. Name a function without arguments that returns an iterable of batches, as in data:batches."


class NowhereToWrite(Fp4CompileError, ValueError):
    template = 'where to? Give --out FILE, or a --policy with calibration = "FILE".'


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("calibrate", help="collect what the layers of a model read, for policies that go by it")
    parser.add_argument("file", type=Path, help="Python file with model() -> (module, inputs), and if given batches()")
    parser.add_argument("--batches", metavar="MODULE:FUNCTION", help="another function that returns batches (default: batches() of FILE)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N batches")
    parser.add_argument("--policy", help="observe the layers that this preset or TOML file quantizes, and what it needs of each")
    parser.add_argument("--out", type=Path, help='the artefact (default: the file that the policy names by calibration = "FILE")')
    parser.add_argument("--moments", choices=("block", "full"), default="block", help='"full": E[x x^T] as a whole, which GPTQ needs')
    parser.add_argument("--save-every", type=int, default=8, metavar="N", help="batches between two savings of the state")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of going on from an unfinished run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from fp4compile.calibration.run import calibrate
    from fp4compile.policy.load import load_policy

    if args.out is None and (args.policy is None or load_policy(args.policy, calibrated=False).calibration is None):
        raise NowhereToWrite
    module, inputs = load_model(args.file)
    batches = batches_of(args.batches, sys.modules[args.file.stem], inputs)
    found = calibrate(
        module, batches if args.limit is None else islice(batches, args.limit), policy=args.policy, out=args.out, moments=args.moments,
        save_every=args.save_every, resume=not args.restart,
    )  # fmt: skip
    rows = [
        {"value read by": e.sites, "K": e.k, "tokens": e.tokens, "amax": e.amax, "moments": "block" if e.moments is None else "full"}
        for e in found.entries
    ]
    if args.json:
        print(json.dumps({"file": found.name, "batches": found.batches, "values": rows, "unreached": found.unreached}, indent=2))
        return 0
    print(tabulate([{**row, "value read by": "\n".join(row["value read by"])} for row in rows], headers="keys", floatfmt=".4g"))
    if found.unreached:
        print(f"\nread by no matmul: {', '.join(found.unreached)}")
    print(f"\n{found.name}: {len(rows)} values, {found.batches} batches")
    return 0


def batches_of(given: str | None, model_file: Any, inputs: tuple[Any, ...]) -> Iterable[Any]:
    """Of `MODULE:FUNCTION`, else batches() or `batches` of the model's file, else its example inputs. Raises `NoBatchesThere`."""
    if given is None:
        own = getattr(model_file, "batches", [inputs])
        batches: Any = own() if callable(own) else own
        return batches
    module, colon, function = given.partition(":")
    if not (module and colon and function):
        raise NoBatchesThere(given=given, found="no module and function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` finds modules of the working folder
    try:
        make = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise NoBatchesThere(given=given, found=str(error)) from None
    if not callable(make):
        raise NoBatchesThere(given=given, found=f"{module} has no function {function}")
    made: Any = make()
    return made
