"""`fp4compile passes`: list the passes, or run some of them over an exported program and print what they leave."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from fp4compile.codegen.errors import Fp4CompileError, UnknownName

_ITEM = re.compile(r"(?P<name>[a-z-]+)(?:\{(?P<options>[^}]*)\})?(?:,|$)")


class BadPassList(Fp4CompileError, ValueError):
    template = (
        "passes: cannot read {found!r} in --run. Write names with commas between them: 'normalize,find-matmuls' or 'name{{option=value}}'."
    )


class NoProgramThere(Fp4CompileError, ValueError):
    template = "passes: {file} does not exist. Save one with torch.export.save(torch.export.export(model, args), {file!r})."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("passes", help="list the passes, or run some over a program saved by torch.export.save")
    parser.add_argument("file", nargs="?", type=Path, help="program saved by torch.export.save")
    parser.add_argument("--run", dest="passes", help="passes to run, in order; default: all. 'normalize,find-matmuls,name{option=value}'")
    parser.add_argument("--policy", default="auto", help="preset or TOML file (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print what each pass changed, as JSON, instead of the graph")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.file is None:
        print("\n".join(f"{each.name:<18} {_first_line(each)}" for each in _known().values()))
        return 0
    if not args.file.is_file():
        raise NoProgramThere(file=str(args.file))
    passes = parse_pass_list(args.passes) if args.passes else list(_known().values())
    gm, record = run_over_program(args.file, passes, args.policy)
    if args.json:
        print(json.dumps([{"pass": p.name, "changed": p.changed, "notes": list(p.notes)} for p in record.passes], indent=2))
        return 0
    from fp4compile.passes.printer import print_graph

    print(print_graph(gm, title="after " + ", ".join(p.name for p in record.passes)))
    return 0


def parse_pass_list(text: str) -> list[Any]:
    """`a,b{x=1}` as pass values. Raises `UnknownName` for a pass or option that does not exist, `BadPassList` for other text."""
    known = _known()
    passes, position = [], 0
    while position < len(text):
        item = _ITEM.match(text, position)
        if item is None:
            raise BadPassList(found=text[position:])
        if item["name"] not in known:
            raise UnknownName(what="pass", found=item["name"], valid=known)
        passes.append(type(known[item["name"]])(**_options(item["options"], known[item["name"]])))
        position = item.end()
    return passes


def _options(text: str | None, default: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in filter(None, (text or "").split(",")):
        name, _, value = pair.partition("=")
        fields = default.__dataclass_fields__
        if name not in fields:
            raise UnknownName(what="option", found=name, valid=fields, where=f"pass {default.name}")
        options[name] = json.loads(value)
    return options


def run_over_program(file: Path, passes: list[Any], policy: str) -> tuple[Any, Any]:
    """Load an exported program, run `passes` over its graph with invariants checked, and return (graph module, record)."""
    import torch

    from fp4compile.capture import device_of
    from fp4compile.codegen.target import target_of
    from fp4compile.passes.base import PassContext
    from fp4compile.passes.pipeline import run as run_pipeline
    from fp4compile.passes.record import GraphRecord
    from fp4compile.passes.site import set_input
    from fp4compile.policy.load import load_policy

    program = torch.export.load(file).run_decompositions()
    gm = program.graph_module
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.kind.name == "PARAMETER"}
    parameters: dict[int, str] = {}
    for position, node in enumerate(placeholders):
        set_input(node, position)
        if node.name in targets:
            parameters[position] = targets[node.name] or node.name
    target = target_of(device_of([n.meta.get("val") for n in placeholders]))
    loaded = load_policy(policy).resolve_for(target)
    record = GraphRecord(id="-", training=False, target=target.name, policy=loaded.name)
    ctx = PassContext(decide=lambda sites: loaded.decide(sites, training=False), target=target, record=record, parameters=parameters)
    run_pipeline(gm, ctx, passes, check=True)
    return gm, record


def _known() -> dict[str, Any]:
    from fp4compile.passes.pipeline import PIPELINE

    return {each.name: each for each in PIPELINE}


def _first_line(each: Any) -> str:
    return (type(each).__doc__ or "").strip().splitlines()[0]
