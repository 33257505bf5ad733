"""A whole bench: which cases, in which order, kept where."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from fp4compile.bench import plot
from fp4compile.bench.case import (
    ACTIVATIONS,
    MODES,
    PHASES,
    Case,
    LayerCase,
    MatmulCase,
    QuantizeCase,
    Shape,
    layer_cases,
    matmul_cases,
    quantize_cases,
)
from fp4compile.bench.environment import Environment, clocks, now
from fp4compile.bench.floor import measure_speeds
from fp4compile.bench.layer import POLICIES, measure_layer
from fp4compile.bench.measure import Bench
from fp4compile.bench.peers import BASELINE, PEERS, Peer, probe
from fp4compile.bench.results import Results, Row
from fp4compile.bench.table import as_text
from fp4compile.codegen.formats import FORMATS
from fp4compile.codegen.timing import FULL, QUICK, Effort


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What is measured where nothing else is said."""

    products: tuple[Shape, ...]
    tensors: tuple[Shape, ...]
    rows: tuple[int, ...]
    experts: tuple[Shape, ...]
    tokens: tuple[int, ...]
    groups: int
    model: str
    prefill: int
    context: int
    layers: int = 2  # more bytes than caches hold


_DEFAULTS: Final = {
    ("cuda", False): Defaults(
        products=((28672, 8192), (14336, 4096), (4096, 4096)), tensors=((8192, 8192), (4096, 4096)),
        rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096), experts=((14336, 4096),), tokens=(8, 64, 512, 4096),
        groups=8, model="8b", prefill=2048, context=1024,
    ),
    ("cuda", True): Defaults(
        products=((4096, 4096),), tensors=((4096, 4096),), rows=(1, 16, 256), experts=((4096, 1024),), tokens=(64,), groups=8,
        model="1b", prefill=512, context=256,
    ),
    ("cpu", False): Defaults(
        products=((1536, 576), (576, 1536), (4096, 4096)), tensors=((2048, 1024),), rows=(1, 8, 64, 512),
        experts=((576, 512),), tokens=(64,), groups=8,
        model="135m", prefill=256, context=256, layers=4,
    ),
    ("cpu", True): Defaults(
        products=((192, 256),), tensors=((128, 256),), rows=(1, 8), experts=((64, 128),), tokens=(9,), groups=4, model="tiny", prefill=16,
        context=16,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for, in full."""

    device: torch.device
    effort: Effort
    quick: bool
    peers: tuple[str, ...]
    cases: tuple[Case, ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        given = _DEFAULTS[device.type, args.quick]
        formats = tuple(args.format or ("nvfp4",))
        cases: list[Case] = []
        if args.what in ("all", "quantize"):
            cases += quantize_cases(args.shapes or given.tensors, tuple(args.format or FORMATS))
        activations = tuple(args.activation or ACTIVATIONS)
        if args.what in ("all", "matmul"):
            cases += matmul_cases(args.shapes or given.products, args.rows or given.rows, formats, activations)
        if args.what in ("all", "grouped"):
            shapes, groups = args.shapes or given.experts, args.groups or given.groups
            cases += matmul_cases(shapes, args.rows or given.tokens, formats, activations, groups)
        if args.what in ("all", "layer"):
            model, layers = args.model or given.model, args.layers or given.layers
            policies, modes, phases = args.policy or tuple(POLICIES), args.mode or MODES, args.phase or PHASES
            cases += layer_cases(model, policies, modes, phases, given.prefill, given.context, layers)
        peers = tuple(dict.fromkeys((BASELINE, *(args.peers if args.peers is not None else PEERS))))
        return cls(device=device, effort=QUICK if args.quick else FULL, quick=args.quick, peers=peers, cases=tuple(cases))


def run(request: Request, folder: Path | None) -> Results:
    """Measure what `folder` does not hold yet, keeping each case as it comes. Raises `OtherEnvironment` or `UnreadableResults`."""
    device = request.device
    environment = Environment.here(device, rounds=request.effort.rounds)
    results = Results.open(folder, environment, started=now(), clocks=clocks(device))
    if results.speeds is None:
        results.speeds = measure_speeds(device, request.effort, small=request.quick)
        results.save()
    open_cases = [case for case in request.cases if not _is_done(case, request, results)]
    with tqdm(total=len(open_cases), unit="case", disable=None) as bar:
        for case in open_cases:
            bar.set_description(case.key)
            results.add(_measure(case, request, results))
            bar.update()
            _write_pages(results, folder)  # every time, for a run may be cut off
    if not open_cases:
        _write_pages(results, folder)
    return results


def _is_done(case: Case, request: Request, results: Results) -> bool:
    """A row counts as long as it has a time or a reason for everyone who is asked for now."""
    row = results.rows.get(case.key)
    if row is None or row.wrong or not isinstance(case, MatmulCase):
        return row is not None
    return {*request.peers} <= {*row.times, *row.failed}


def _measure(case: Case, request: Request, results: Results) -> Row:
    assert results.speeds is not None

    def remembered_probe(peer: Peer, case: MatmulCase) -> str:
        few = "1 row" if case.m == 1 else "up to 64 rows" if case.m <= 64 else "many rows"  # other kernels, so other failures
        tried = f"{peer.name}, {case.kind}, {case.scheme}, {few}"
        if tried not in results.probes:
            results.probes[tried] = probe(peer, case, request.device)
            results.save()
        return results.probes[tried]

    if isinstance(case, LayerCase):
        return measure_layer(case, request.device, request.effort, results.speeds)
    bench = Bench(device=request.device, effort=request.effort, speeds=results.speeds, peers=request.peers, probe=remembered_probe)
    return bench.quantize(case) if isinstance(case, QuantizeCase) else bench.matmul(case)


def _write_pages(results: Results, folder: Path | None) -> None:
    if folder is None:
        return
    (folder / "bench.md").write_text(as_text(results, "github") + "\n")
    title = "Block-scaled FP4 products, times as fast as bf16"
    picture = plot.svg_of(results.rows.values(), title=title, subtitle=f"{results.environment}, {results.started[:10]}")
    if picture:
        (folder / "speed.svg").write_text(picture)
