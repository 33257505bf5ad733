"""`fp4compile doctor`: what this machine can run, and which versions are known to be bad."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from typing import Any

import torch
from tabulate import tabulate

from fp4compile.codegen.cpu import launch
from fp4compile.codegen.known_bad import TESTED, Feature, KnownBad, installed, is_too_old, is_unknown, known_bad
from fp4compile.codegen.registry import families_on, relied_on
from fp4compile.codegen.target import Target, target_of


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("doctor", help="say what this machine can run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    rows = diagnose()
    print(json.dumps(rows, indent=2) if args.json else tabulate(rows, headers="keys", tablefmt="simple", maxcolwidths=[None, 40, 80]))
    return 1 if any(row["verdict"] == "bad" for row in rows) else 0


def diagnose() -> list[dict[str, str]]:
    """One row a fact: what, found, verdict (ok, note, bad), and what follows."""
    rows = [_row("python", platform.python_version(), "ok", "")]
    rows += [_version_row(name) for name in ("torch", "triton")]
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    rows.append(
        _row(
            "c++ compiler",
            "found" if compiler else "none",
            "ok" if compiler else "bad",
            "" if compiler else "Inductor and our CPU kernels need one",
        )
    )
    targets = [target_of(torch.device("cpu"))]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            rows.append(_row(f"cuda:{index}", f"sm_{major}{minor}", "bad", "compute capability 8.0 or newer is needed"))
            continue
        targets.append(target_of(torch.device("cuda", index)))
    rows += [_target_row(target) for target in targets]
    rows += [_known_bad_row(row, target) for target in targets for row in known_bad(target)]
    return rows


def _target_row(target: Target) -> dict[str, str]:
    if target.device_type == "cpu":
        missing = launch.available()  # builds the kernels, once on a machine
        return _row("cpu", platform.machine(), "note" if missing else "ok", missing or "W4A16 and W4A4 run in C++ kernels")
    return _row("gpu", target.name, "ok", f"kernels of products: {', '.join(families_on(target))}")


def _version_row(package: str) -> dict[str, str]:
    version = installed(package)
    if not version:
        needed = package == "torch"
        return _row(package, "not installed", "bad" if needed else "note", "needed" if needed else "needed for GPUs")
    low, high = TESTED[package]
    if is_too_old(package, version):
        return _row(package, version, "bad", f"{low} or newer is needed; GPUs are refused with this version")
    if is_unknown(package, version):
        return _row(package, version, "note", f"tested from {low} to {high}; this version is unknown to us")
    return _row(package, version, "ok", "")


def _known_bad_row(row: KnownBad, target: Target) -> dict[str, str]:
    """bad: `torch.compile(backend="fp4")` refuses what needs it. note: worth knowing, and nothing of ours is concerned."""
    refused = row.feature in relied_on(families_on(target))
    if refused:
        ours = "compiling for it is refused"
    elif row.feature is Feature.INDUCTOR:
        ours = "every compiled model has these, whatever its backend"
    elif row.feature is Feature.EAGER_ROUNDING:
        ours = "demo and bench check their layers with torch's operators run one by one instead"
    else:
        ours = "our kernels there do without"
    return _row(f"{row.package} {installed(row.package)}", target.name, "bad" if refused else "note", f"{row}; {ours}")


def _row(what: str, found: str, verdict: str, note: str) -> dict[str, str]:
    return {"what": what, "found": found, "verdict": verdict, "note": note}
