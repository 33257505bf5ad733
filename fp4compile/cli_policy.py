"""`fp4compile policy`: check a policy file, show what a policy resolves to, write a first one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fp4compile.codegen.errors import Fp4CompileError

_STARTER = """\
# Which matmuls become 4-bit, and how. Check this file with `fp4compile policy check {name}`, see what it resolves to with
# `fp4compile policy show {name}`, use it with torch.compile(model, backend="fp4", options={{"policy": "{name}"}}).
version = 1
description = "what this policy is for"
extends = "auto"  # a preset (`fp4compile policy show` lists them) or another file, relative to this one

# What a matmul gets that no rule matches. Everything not given here comes from "auto".
# [default]
# activation = {{ global_scale = "row" }}
# weight = {{ scale_rule = "four_over_six" }}

# Exceptions. Of the rules that match a matmul the LAST one decides alone, so append yours below the general ones.
# A pattern names the last segments of a module path: `*` stands for any characters within one segment, `**` for whole segments,
# and "re:" starts a regular expression. A rule that matches nothing is an error, not a silent no-op.
#
# [[rule]]
# match = "layers.*.mlp.down_proj"
# precision = "high"                 # "high": the model's own dtype. "w4a4": both operands 4-bit. "w4a16": the weight only.
# reason = "its input has outliers"  # shown in the report
#
# [[rule]]
# match = ["q_proj", "k_proj", "v_proj"]
# activation = {{ scale_rule = "four_over_six" }}
#
# [[rule]]
# depth = "last:4"                   # counts layers with a weight
# precision = "high"

# What the matmuls of a training graph get. Roles of the backward that are not named keep the model's own dtype.
# [training]
# dgrad = {{ gradient = {{ rounding = "stochastic" }} }}
# wgrad = {{ hadamard = 16, gradient = {{ rounding = "stochastic" }} }}
"""


class FileExists(Fp4CompileError, FileExistsError):
    template = "{path} exists already. Give another path, or --force to overwrite it."


def add_parser(subparsers: Any) -> None:
    """Add `policy` with its three verbs. Each sets `run`, a function of the parsed arguments that returns the exit code."""
    policy = subparsers.add_parser("policy", help="check, show or start a policy file")
    verbs = policy.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="read a policy and say what is wrong with it")
    check.add_argument("policy", help="TOML file, or the name of a preset")
    show = verbs.add_parser("show", help="print what a policy resolves to; without a name, list the presets")
    show.add_argument("policy", nargs="?", help="TOML file, or the name of a preset")
    show.add_argument("--toml", action="store_true", help="print the resolved policy as one policy file")
    init = verbs.add_parser("init", help="write a commented policy file to start from")
    init.add_argument("path", nargs="?", default="policy.toml", help="file to write (default: policy.toml)")
    init.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    for parser, run in ((check, _check), (show, _show), (init, _init)):
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=run)


def _check(args: argparse.Namespace) -> int:
    from fp4compile.policy.describe import details_of, settings_table, variants_of
    from fp4compile.policy.load import load_policy

    try:
        policy = load_policy(args.policy)
    except Fp4CompileError as error:
        if not args.json:
            raise
        print(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}, indent=2))
        return 1
    variants = variants_of(policy)
    if args.json:
        print(json.dumps({"ok": True, "name": policy.name, "variants": [details_of(v) for v in variants]}, indent=2))
        return 0
    rules = variants[0].rules
    print(f"{policy.name}: ok. {len(rules)} rules; {sum(not rule.optional for rule in rules)} of them are errors where they match nothing.")
    print(f"\n{settings_table(variants)}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from fp4compile.policy.describe import details_of, rules_table, settings_table, variants_of
    from fp4compile.policy.load import load_policy
    from fp4compile.policy.presets import list_presets

    if args.policy is None:
        presets = [{"name": name, "description": description} for name, description in list_presets()]
        print(json.dumps(presets, indent=2) if args.json else tabulate(presets, headers="keys"))
        return 0
    policy = load_policy(args.policy)
    variants = variants_of(policy)
    if args.toml:
        print(policy.to_toml(), end="")
    elif args.json:
        print(json.dumps({"name": policy.name, "variants": [details_of(v) for v in variants]}, indent=2))
    else:
        parts = [settings_table(variants), *(f"{v.name}: {v.description}\n\n{rules_table(v)}" for v in variants)]
        print("\n\n".join(parts))
    return 0


def _init(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if path.exists() and not args.force:
        raise FileExists(path=args.path)
    path.write_text(_STARTER.format(name=path.name), encoding="utf-8")
    print(json.dumps({"path": args.path}) if args.json else f"wrote {args.path}; next: fp4compile policy check {args.path}")
    return 0
