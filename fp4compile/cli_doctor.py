"""`fp4compile doctor`: what this machine can run, and which versions are known to be bad."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
from typing import Any, Final

import torch
from tabulate import tabulate

from fp4compile.codegen.cpu import launch
from fp4compile.codegen.target import Target, target_of

# (package, version prefix, target prefix, what goes wrong)
KNOWN_BAD: Final = (
    ("triton", "3.6", "sm_9", "tl.dot_scaled with e4m3 scales crashes the compiler; our kernels do not use it there"),
    ("triton", "3.7", "sm_9", "tl.dot_scaled with e4m3 scales crashes the compiler; our kernels do not use it there"),
    ("triton", "3.8", "sm_12", "dot_scaled is wrong for operands packed along M or N (triton issue 11733); ours are packed along K"),
)
TESTED: Final = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.9")}


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
    rows += [_row(f"{package} {version}", target.name, "note", what) for target in targets for package, version, what in _known_bad(target)]
    return rows


def _target_row(target: Target) -> dict[str, str]:
    if target.device_type == "cpu":
        missing = launch.available()  # builds the kernels, once on a machine
        return _row("cpu", platform.machine(), "note" if missing else "ok", missing or "W4A16 and W4A4 run in C++ kernels")
    how = (
        "native FP4 instructions exist; the kernels of this version emulate them"
        if target.has_fp4_mma
        else "W4A16, and W4A4 emulated exactly in bf16"
    )
    return _row("gpu", target.name, "ok", how)


def _version_row(package: str) -> dict[str, str]:
    version = _installed(package)
    if not version:
        return _row(
            package, "not installed", "note" if package == "triton" else "bad", "needed for GPUs" if package == "triton" else "needed"
        )
    low, high = TESTED[package]
    known = _minor(low) <= _minor(version) <= _minor(high)
    return _row(package, version, "ok" if known else "note", "" if known else f"tested from {low} to {high}; this version is unknown to us")


def _known_bad(target: Target) -> list[tuple[str, str, str]]:
    return [(p, v, what) for p, v, t, what in KNOWN_BAD if _installed(p).startswith(v + ".") and target.name.startswith(t)]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _row(what: str, found: str, verdict: str, note: str) -> dict[str, str]:
    return {"what": what, "found": found, "verdict": verdict, "note": note}
