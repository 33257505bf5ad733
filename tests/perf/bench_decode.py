"""The decode products on the GPU at hand: checked against float64, then timed beside cuBLAS, torch's int4 product and the byte floor.

Run `python tests/perf/bench_decode.py FOLDER [--sweep]`; no installation is needed. Times are medians from CUDA graphs over rotating
copies of the weight larger than L2. `--sweep` tries every tile of `candidates` on tiled weights beside the chosen one. Results go to
FOLDER/decode.json.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.perf.linked_package import link_package

_PACKAGE = link_package()

from fp4compile.codegen.kernels.decode_mm import NarrowTile, WideTile, choose_tile, decode_mm, tile_weight  # noqa: E402 (after link_package)
from fp4compile.codegen.reference.block import dequantize_ref  # noqa: E402

SHAPES = [(28672, 8192), (14336, 4096), (4096, 4096)]
ROWS = (1, 4, 8, 16, 32, 64, 128)
LAYOUTS = ((False, False), (False, True), (True, False), (True, True))  # tiled, early
WORST_ERROR = 5e-4  # norm ratio against float64 of the exact dequants, float32 output
FAILURES = (triton.TritonError, RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, AttributeError, KeyError)
Tile = NarrowTile | WideTile


def candidates(m: int) -> Iterator[Tile]:
    if m <= 16:
        columns = -(-m // 8)
        for (steps, rows), (warps_r, warps_k) in itertools.product(
            ((1, 1), (2, 1), (1, 2)), ((2, 2), (1, 4), (1, 8), (1, 2), (2, 4))
        ):  # fmt: skip
            yield NarrowTile(steps=steps, row_tiles=rows, column_tiles=columns, warps_r=warps_r, warps_k=warps_k)
    block_ms = {1: (16,), 4: (), 8: (16,), 16: (16,), 32: (32,), 64: (64,), 128: (64, 128)}[m]
    for block_m, (block_n, warps), stages, chunks in itertools.product(
        block_ms, ((64, 4), (128, 4), (128, 8), (256, 8)), (3, 4), (1, 2, 4)
    ):  # fmt: skip
        fits = stages * chunks * (block_n * 72 + block_m * 256) <= 225_000
        if fits and not (block_m >= 64 and (chunks == 4 or (block_n, warps) == (128, 4))) and not (block_m == 128 and chunks > 1):
            yield WideTile(block_n=block_n, block_m=block_m, chunks=chunks, stages=stages, warps=warps)


def random_weight(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any codes, and scales from 2^-5 to 240."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.randint(16, 120, (n, k // 16), dtype=torch.uint8, device="cuda", generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)


def error(m: int, n: int, k: int, dtype: torch.dtype, tiled: bool, tile: Tile | None, early: bool = False, spread: int = 0) -> float:
    """Norm ratio of the float32 output; `spread` gives each row of x a power of two of its own up to 2^±spread."""
    codes, scales = random_weight(n, -(-k // 16) * 16, m + n)
    x = torch.randn(m, k, device="cuda")
    x = (x * 2.0 ** torch.linspace(-spread, spread, m, device="cuda")[:, None]).to(dtype)
    b_global, bias = torch.rand(n, device="cuda") + 0.1, torch.zeros(n, device="cuda")
    weight = tile_weight(codes, scales) if tiled else (codes, scales)
    want = (x.double() @ dequantize_ref(codes, scales)[:, :k].double().mT) * b_global.double()
    got, again = (decode_mm(x, *weight, b_global, bias, torch.float32, n=n, tile=tile, weight_is_old=early).double() for _ in range(2))
    assert torch.equal(got, again), "two runs differ"
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


def hard_cases() -> list[tuple[str, Callable[[], float]]]:
    """Chosen tiles on what is not round: shapes, dtypes, ranges, NaN scales. Each gives an error, NaN where a NaN was lost or spread."""
    cases: list[tuple[str, Callable[[], float]]] = []
    for (m, n, k), dtype, tiled in itertools.product(
        ((1, 33, 16), (3, 1000, 999), (7, 4100, 4112), (17, 1000, 1000), (42, 777, 2080)),
        (torch.bfloat16, torch.float16, torch.float32), (False, True),
    ):  # fmt: skip
        cases.append((f"{m}x{n}x{k} {dtype} tiled={tiled}", functools.partial(error, m, n, k, dtype, tiled, None)))
    for m, tiled in itertools.product((2, 8, 32, 128), (False, True)):
        spread = functools.partial(error, m, 512, 1024, torch.bfloat16, tiled, None, spread=100)
        cases += [(f"x from 2^-100 to 2^100, M={m}", spread), (f"NaN scales, M={m}", functools.partial(nan_error, m, tiled))]
    return cases


def nan_error(m: int, tiled: bool) -> float:
    codes, scales = random_weight(256, 1024, 1)
    scales.view(torch.uint8)[5, 3], scales.view(torch.uint8)[255, 63] = 0x7F, 0xFF
    weight = tile_weight(codes, scales) if tiled else (codes, scales)
    out = decode_mm(torch.ones(m, 1024, device="cuda", dtype=torch.bfloat16), *weight, None, None, torch.bfloat16)
    right = out.isnan().all(0).nonzero().flatten().tolist() == [5, 255] and out.isnan().sum().item() == 2 * m
    return 0.0 if right else float("nan")


def microseconds(calls: list[Callable[[], object]], repeats: int = 9) -> float:
    """Median time of one call, all of them captured in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[repeats // 2]


def int4_weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    return torch._convert_weight_to_int4pack(packed, 8), torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)


def time_shape(n: int, k: int, sweep: bool, verified: set[str], bandwidth: float) -> Iterator[dict[str, Any]]:
    copies = -(-200_000_000 // (n * k * 9 // 16)) + 1
    plain = [random_weight(n, k, seed) for seed in range(copies)]
    weights = {False: plain, True: [tile_weight(*w) for w in plain]}
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(-(-200_000_000 // (n * k * 2)) + 1)]
    int4 = [int4_weight(n, k) for _ in range(copies)]
    b_global = torch.rand((), device="cuda")
    for m in ROWS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        shape: dict[str, Any] = {"n": n, "k": k, "m": m}
        cublas = microseconds([functools.partial(torch.nn.functional.linear, x, w) for w in dense])
        torch_int4 = microseconds([functools.partial(torch._weight_int4pack_mm, x, w[0], 128, w[1]) for w in int4])
        floor = (n * k * 9 / 16 + 2 * m * (n + k)) / bandwidth
        print(f"\n{n}x{k} M={m}: cuBLAS {cublas:.1f}, torch int4 {torch_int4:.1f}, floor {floor:.1f}", flush=True)
        yield shape | {"cublas": cublas, "torch_int4": torch_int4, "floor": floor}
        for tiled, early in LAYOUTS:
            layout = ("tiled" if tiled else "plain") + (" early" if early else "")
            found = []
            for tile in tiles(m, n, k, tiled, sweep):
                if key(m, tile, tiled, early) in verified:
                    options = {"n": n, "tile": tile, "weight_is_old": early}
                    calls = [functools.partial(decode_mm, x, *w, b_global, None, torch.bfloat16, **options) for w in weights[tiled]]
                    found.append((microseconds(calls), str(tile)))
            found.sort()
            for time, name in found[:3]:
                print(f"  {time:7.2f} {cublas / time:5.2f}x {layout:<12}{name}", flush=True)
            yield from (shape | {"layout": layout, "tile": name, "microseconds": time, "ratio": cublas / time} for time, name in found)


def tiles(m: int, n: int, k: int, tiled: bool, sweep: bool) -> list[Tile]:
    """The chosen tile, and the candidates where a sweep is asked for; plain weights are not swept."""
    every = [choose_tile(m, n, k, tiled), *(candidates(m) if sweep and tiled else ())]
    return list(dict.fromkeys(every))


def key(m: int, tile: Tile, tiled: bool, early: bool) -> str:
    return json.dumps([min(m, 2), type(tile).__name__, asdict(tile), tiled, early])


def verify_part(part: int, parts: int, sweep: bool, out: Path) -> None:
    """Compile and check the tiles and hard cases numbered `part` modulo `parts`."""
    every = {
        key(m, tile, tiled, early): (m, tile, tiled, early)
        for m, (n, k), (tiled, early) in itertools.product(ROWS, SHAPES, LAYOUTS)
        for tile in tiles(m, n, k, tiled, sweep)
    }
    checks = [(name, functools.partial(_tile_error, *every[name])) for name in sorted(every)] + hard_cases()
    good, worst = [], 0.0
    for name, check in checks[part::parts]:
        try:
            found = check()
        except FAILURES as failure:
            print(f"FAIL {name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
            continue
        if found <= WORST_ERROR:
            good.append(name)
            worst = max(worst, found)
        else:
            print(f"WRONG {name}: error {found}", flush=True)
    out.write_text(json.dumps({"good": good, "of": len(checks[part::parts]), "worst": worst}))


def _tile_error(m: int, tile: Tile, tiled: bool, early: bool) -> float:
    return error(m, 4096, 4096, torch.bfloat16, tiled, tile, early)


def verify_all(given: argparse.Namespace) -> set[str]:
    """Names of what is right, found by as many processes as there are cores: compiling takes longest."""
    workers = min(15, os.cpu_count() or 1)
    processes = [subprocess.Popen([sys.executable, *sys.argv, "--part", str(i), str(workers)]) for i in range(workers)]
    good: list[str] = []
    total, worst = 0, 0.0
    for i, process in enumerate(processes):
        if process.wait() == 0:
            part = given.folder / f"part{i}"
            found = json.loads(part.read_text())
            good, total, worst = good + found["good"], total + found["of"], max(worst, found["worst"])
            part.unlink()
    print(f"{len(good)} of {total} checks passed, worst error {worst:.1e}", flush=True)
    return set(good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--part", type=int, nargs=2, help="used by the script itself")
    given = parser.parse_args()
    if given.part:
        verify_part(*given.part, given.sweep, given.folder / f"part{given.part[0]}")
        return 0
    verified = verify_all(given)
    big = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    bandwidth = big.nbytes / microseconds([big.sum] * 3)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, read {bandwidth / 1e6:.2f} TB/s")
    del big
    text = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    rows: list[dict[str, Any]] = []
    for n, k in SHAPES:
        rows += time_shape(n, k, given.sweep, verified, bandwidth)
        (given.folder / "decode.json").write_text(json.dumps(text | {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
