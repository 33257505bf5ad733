"""`fp4compile sensitivity`: which part of a model loses how much, for a model that a Python file builds."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from fp4compile.cli_calibrate import batches_of
from fp4compile.cli_explain import load_model
from fp4compile.codegen.errors import Fp4CompileError


class BadRole(Fp4CompileError, ValueError):
    template = "--role {found!r}: NAME=GLOB is needed, as in attention=self_attn.*"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("sensitivity", help="quantize one part of a model at a time and say what each costs")
    parser.add_argument(
        "file", type=Path, help="Python file with model() -> (module, inputs), and if given batches() and loss(outputs, batch)"
    )
    parser.add_argument("--batches", metavar="MODULE:FUNCTION", help="another function that returns batches (default: batches() of FILE)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N batches")
    parser.add_argument("--policy", action="append", help="preset or TOML file; may be repeated (default: nvfp4 and mxfp4)")
    parser.add_argument("--isolate", nargs="+", choices=("role", "block", "site"), default=["role", "block"], help="kinds of parts")
    parser.add_argument("--role", action="append", default=[], metavar="NAME=GLOB", help="a role by its module paths; may be repeated")
    parser.add_argument("--no-estimate", action="store_true", help="leave out the first-order estimate, which needs a backward")
    parser.add_argument(
        "--store", type=Path, default=Path("sensitivity.json"), help="written after every part; a killed run goes on from it"
    )
    parser.add_argument("--out", type=Path, help="folder for the table, JSON and pictures")
    parser.add_argument(
        "--keep", type=float, metavar="SHARE", help="also write a policy with at most this share of FLOPs in high precision"
    )
    parser.add_argument("--keep-policy", type=Path, default=Path("keep.toml"), help="where (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fp4compile.isolation.run import sensitivity

    module, inputs = load_model(args.file)
    source = sys.modules[args.file.stem]
    batches = islice(batches_of(args.batches, source, inputs), args.limit)
    policies = args.policy or ["nvfp4", "mxfp4"]
    found = sensitivity(
        module, batches, policies=policies, isolate=args.isolate, roles=_roles(args.role) or None, loss=getattr(source, "loss", None),
        estimate=not args.no_estimate, store=args.store,
    )  # fmt: skip
    if args.out:
        found.write(args.out)
    print(found.to_json() if args.json else found.to_table())
    if args.keep is not None:
        choice = found.keep(args.keep)
        args.keep_policy.write_text(choice.to_toml(extends=_extends(policies[0], args.keep_policy)))
        print(
            f"{args.keep_policy}: {len(choice.modules)} modules, {choice.flops:.1%} of the FLOPs, chosen by {choice.basis}", file=sys.stderr
        )
    return 0


def _roles(given: list[str]) -> dict[str, list[str]]:
    roles: dict[str, list[str]] = {}
    for item in given:
        name, equals, glob = item.partition("=")
        if not (name and equals and glob):
            raise BadRole(found=item)
        roles.setdefault(name, []).append(glob)
    return roles


def _extends(policy: str, written: Path) -> str:
    """As the policy is named from the folder of the file that extends it."""
    if not Path(policy).is_file():
        return policy
    return Path(policy).resolve().as_posix() if written.resolve().parent != Path(policy).resolve().parent else Path(policy).name
