"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import fp4compile
from fp4compile.codegen.errors import Fp4CompileError

# Each module brings one subcommand through `add_parser(subparsers)` and sets `run(args) -> int` as its default.
_COMMANDS = ("cli_demo", "cli_explain", "cli_policy", "cli_passes", "cli_doctor", "cli_bench", "cli_sensitivity", "cli_calibrate")
_ENVIRONMENT = """environment:
  FP4COMPILE_POLICY   policy for torch.compile calls that name none: a preset or a TOML file
  FP4COMPILE_DUMP     folder that receives a dump of every compiled graph
  FP4COMPILE_STRICT   1: a matmul that cannot follow the policy is an error
  FP4COMPILE_VERIFY   1: check the graph's invariants after every pass
  TORCH_LOGS=+fp4compile   debug log"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fp4compile",
        description="Compile existing PyTorch models to NVFP4.",
        epilog=_ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fp4compile {fp4compile.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"fp4compile.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 with the message of an `Fp4CompileError` on stderr."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except Fp4CompileError as error:
        print(f"fp4compile {args.command}: {error}", file=sys.stderr)
        return 1
