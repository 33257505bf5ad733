"""`fp4compile demo`: a real model before and after, on this machine, in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="compile SmolLM2-135M to NVFP4 and measure perplexity, size and speed before and after")
    parser.add_argument(
        "--policy", action="append", metavar="NAME", help="preset or TOML file to measure; may be repeated (default: three)"
    )
    parser.add_argument("--windows", type=_at_least(1), default=6, help="windows of 512 tokens to score (default: %(default)s)")
    parser.add_argument("--tokens", type=_at_least(0), default=24, help="tokens to generate; 0 skips it (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--cache", type=Path, default=Path(".demo"), help="folder for the downloaded model and text (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fp4compile.demo.run import main

    return main(args)


def _at_least(lowest: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        return value

    return parse
