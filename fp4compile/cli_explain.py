"""`fp4compile explain`: the dry run from the shell, for a model that a Python file builds."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from fp4compile.codegen.errors import Fp4CompileError


class NoModelThere(Fp4CompileError, ValueError):
    template = "{file} {found}. Define a function `model()` that returns (module, inputs): the module and a tuple of example inputs."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("explain", help="say what would be done with each matmul of a model, and why")
    parser.add_argument("file", type=Path, help="Python file with a function model() that returns (module, inputs)")
    parser.add_argument("--policy", default="auto", help="preset or TOML file (default: %(default)s)")
    parser.add_argument("--training", action="store_true", help="trace the backward as well")
    parser.add_argument("--all", action="store_true", help="one row a matmul; repeated layers are folded otherwise")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from fp4compile.backend import explain

    module, inputs = load_model(args.file)
    with torch.set_grad_enabled(args.training):
        report = explain(module, *inputs, policy=args.policy)
    print(report.to_json() if args.json else report.to_table(folded=not args.all))
    return 0


def load_model(file: Path) -> tuple[Any, tuple[Any, ...]]:
    """Import `file` and call its `model()`. Raises `NoModelThere`."""
    import torch

    if not file.is_file():
        raise NoModelThere(file=file, found="does not exist")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    build = getattr(module, "model", None)
    if not callable(build):
        raise NoModelThere(file=file, found="has no function model()")
    if isinstance(build, torch.nn.Module):
        raise NoModelThere(file=file, found="has a module named model, not a function")
    built = build()
    if not (isinstance(built, tuple) and len(built) == 2):
        raise NoModelThere(file=file, found="has a model() that returned something else")
    return built[0], tuple(built[1])
