"""The public products on the GPU at hand: verified, then timed beside cuBLAS, torch's int4 product and the floor of bytes and operations.

Run `python tests/perf/bench_matmul.py FOLDER [--tiles] [--rows M,M,...] [--host]`; no installation is needed. What is timed is
`torch.ops.fp4.scaled_mm`, medians from CUDA graphs over rotating copies of the weight larger than L2. `--tiles` times what else
might have been chosen. Results go to FOLDER/matmul.json, ratios to cuBLAS bfloat16 in the same run.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import datetime
import faulthandler
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.perf.linked_package import link_package

_PACKAGE = link_package()

from fp4compile.codegen import ops  # noqa: E402 (after link_package)
from fp4compile.codegen.formats import GlobalScale, QuantConfig  # noqa: E402
from fp4compile.codegen.kernels.decode_mm import DecodeTile, NarrowTile, choose_tile, decode_mm  # noqa: E402
from fp4compile.codegen.kernels.hopper_tiles import HALF_TILES, REGISTER_TILES, TILES, HopperTile  # noqa: E402
from fp4compile.codegen.reference.block import dequantize_ref  # noqa: E402
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref  # noqa: E402
from fp4compile.codegen.reference.layout import lay_out_ref  # noqa: E402
from fp4compile.codegen.reference.matmul import scaled_mm_ref  # noqa: E402
from fp4compile.codegen.timing import QUICK, microseconds  # noqa: E402
from tests.codegen.kernels.exact_products import exact_side  # noqa: E402
from tests.perf.failures import FAILURES  # noqa: E402

SHAPES = [(28672, 8192), (14336, 4096), (4096, 4096)]
TRAINING = [(8192, 4096, 4096), (8192, 11008, 4096), (8192, 4096, 11008), (8192, 12288, 4096)]
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096)
HOST_ROWS = (1, 8, 32, 512)  # a kernel for few rows, and three launches for more
WORST_ERROR = 5e-4  # norm ratio against float64 of the exact dequants, float32 output
REPEATS = 200
HANGS_AFTER = 60.0  # seconds of one check, its compilation included
MM, GROUPED = torch.ops.fp4.scaled_mm, torch.ops.fp4.scaled_grouped_mm

OTHER_TILES = (
    replace(TILES[1], x_stages=3, code_stages=3),
    HopperTile(block_m=128, block_n=128, x_stages=4, code_stages=4, warps=8, decode_warps=8, registers=88),
    HopperTile(block_m=64, block_n=64, x_stages=3, code_stages=3, warps=4, decode_warps=4, registers=96, most_registers=96),
)


def random_weight(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any codes, and scales from 2^-5 to 240."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.randint(16, 120, (n, k // 16), dtype=torch.uint8, device="cuda", generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)


def int4_weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    return torch._convert_weight_to_int4pack(packed, 8), torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)


def exact(
    m: int, n: int, k: int, a_kind: str, b_kind: str, *, tiled: bool = False, repeats: int = 1, tile: DecodeTile | None = None
) -> float:
    """0 where every bit is right in every run: operands whose sums float32 holds exactly, scales a row, a bias."""
    generator = torch.Generator("cuda").manual_seed(m + n)
    a, b = (exact_side(kind, shape, generator, global_scale="row") for kind, shape in ((a_kind, (m, k)), (b_kind, (n, k))))
    bias = torch.randn(n, device="cuda", generator=generator)
    weight, layout = (b.data, b.scales), "plain"
    if tiled:
        assert b.scales is not None
        weight, layout = lay_out_ref(b.data, b.scales, "tiled"), "tiled"
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        want = scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, dtype)
        for _ in range(repeats):
            if tile is None:
                got = MM(*a.arguments(), *weight, b.global_scale, bias, k, dtype, b_layout=layout)
            else:
                got = decode_mm(a.data, *weight, b.global_scale, bias, dtype, n=n, a_global=a.global_scale, tile=tile)
            wrong += (got[:, :n] != want).sum()
    return float(wrong)


def exact_groups(a_kind: str, tiled: bool, ends: tuple[int, ...]) -> float:
    generator = torch.Generator("cuda").manual_seed(7)
    a = exact_side(a_kind, (ends[-1] + 3, 320), generator, global_scale="row")
    b = exact_side("nvfp4", (len(ends), 528, 320), generator, global_scale="tensor")
    offs = torch.tensor(ends, dtype=torch.int32, device="cuda")
    assert b.scales is not None
    weight = lay_out_ref(b.data, b.scales, "tiled") if tiled else (b.data, b.scales)
    got = GROUPED(*a.arguments(), *weight, b.global_scale, offs, 320, torch.float32, b_layout="tiled" if tiled else "plain")
    want = scaled_grouped_mm_ref(*a.arguments(), *b.arguments(), offs, 320, torch.float32)
    return float((got != want).sum())


def error(m: int, n: int, k: int, dtype: torch.dtype, spread: int = 0) -> float:
    """Norm ratio of float32 output, the worst row's; `spread` gives each row of x a power of two of its own up to 2^±spread."""
    codes, scales = random_weight(n, k, m + n)
    x = torch.randn(m, k, device="cuda")
    x = (x * 2.0 ** torch.linspace(-spread, spread, m, device="cuda")[:, None]).to(dtype)
    want = x.double() @ dequantize_ref(codes, scales).double().mT
    got = MM(x, None, None, *lay_out_ref(codes, scales, "tiled"), None, None, k, torch.float32, b_layout="tiled").double()
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


def against_cublas(m: int, n: int, k: int) -> float:
    """0 where bfloat16 output is no worse than cuBLAS on the dequantized operands, against float64."""
    codes, scales = random_weight(n, k, m + n)
    x, weight = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), dequantize_ref(codes, scales)
    want = x.double() @ weight.double().mT
    ours = MM(x, None, None, *lay_out_ref(codes, scales, "tiled"), None, None, k, torch.bfloat16, b_layout="tiled").double()
    theirs = (x @ weight.bfloat16().mT).double()
    return max(0.0, ((ours - want).norm() / (theirs - want).norm()).item() - 1.001)


def nan_rows(m: int) -> float:
    codes, scales = random_weight(256, 1024, 1)
    scales.view(torch.uint8)[5, 3], scales.view(torch.uint8)[255, 63] = 0x7F, 0xFF
    x = torch.ones(m, 1024, device="cuda", dtype=torch.bfloat16)
    out = MM(x, None, None, *lay_out_ref(codes, scales, "tiled"), None, None, 1024, torch.bfloat16, b_layout="tiled")
    right = out.isnan().all(0).nonzero().flatten().tolist() == [5, 255] and out.isnan().sum().item() == 2 * m
    return 0.0 if right else float("nan")


def every_code(rows: int, dtype: torch.dtype, layout: str) -> float:
    """Every code under every scale: one-hot rows of x read the dequantized weight out."""
    pairs = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8, device="cuda")
    codes = pairs.repeat(256, 8)
    scales = torch.arange(256, dtype=torch.uint8, device="cuda")[:, None].repeat(1, 8).view(torch.float8_e4m3fn)
    x = torch.eye(128, dtype=dtype, device="cuda").repeat(-(-rows // 128), 1)[:rows]
    got = MM(x, None, None, *lay_out_ref(codes, scales, layout), None, None, 128, torch.float32, b_layout=layout)
    want = dequantize_ref(codes, scales).mT.repeat(-(-rows // 128), 1)[:rows]
    return float(torch.where(want.isnan(), ~got.isnan(), got != want).sum())


def checks() -> dict[str, Callable[[], float]]:
    every: dict[str, Callable[[], float]] = {}
    shapes = ((1, 32, 64), (7, 1040, 4096), (17, 528, 1008), (64, 4096, 2048), (129, 784, 336), (300, 528, 2080))
    for (m, n, k), a, tiled in itertools.product(shapes, ("bf16", "fp16", "fp32", "nvfp4", "mxfp4"), (False, True)):
        every[f"{m}x{n}x{k} {a} x nvfp4 tiled={tiled}"] = functools.partial(exact, m, n, k, a, "nvfp4", tiled=tiled)
    for (a, b), (m, n, k) in itertools.product((("bf16", "mxfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "bf16")), shapes[2:]):
        every[f"{m}x{n}x{k} {a} x {b}"] = functools.partial(exact, m, n, k, a, b)
    for m, n in itertools.product((1, 16, 32, 64, 128, 256, 1024), (4096, 28672)):
        runs = REPEATS if n == 4096 else REPEATS // 4
        every[f"{runs} runs, M={m} N={n}"] = functools.partial(exact, m, n, 4096, "bf16", "nvfp4", tiled=True, repeats=runs)
    for tile, splits in itertools.product((*TILES, *OTHER_TILES, *REGISTER_TILES), (1, 3)):
        one = replace(tile, splits=splits)
        every[f"{one}"] = functools.partial(exact, 200, 1040, 1040, "bf16", "nvfp4", tiled=True, repeats=20, tile=one)
    for tile, n, tiled in itertools.product(HALF_TILES, (1040, 1033), (False, True)):
        every[f"{tile} N={n} tiled={tiled}"] = functools.partial(exact, 300, n, 1040, "bf16", "nvfp4", tiled=tiled, repeats=20, tile=tile)
    for a, tiled, ends in itertools.product(("bf16", "nvfp4"), (False, True), ((0, 2, 2, 7), (5, 80, 300, 301))):
        every[f"groups {a} tiled={tiled} {ends}"] = functools.partial(exact_groups, a, tiled, ends)
    for m, dtype in itertools.product((1, 8, 40, 200, 2048), (torch.bfloat16, torch.float16)):
        every[f"error M={m} {dtype}"] = functools.partial(error, m, 1024, 4096, dtype)
    for m, dtype, layout in itertools.product((16, 128, 512), (torch.bfloat16, torch.float16), ("plain", "tiled")):
        every[f"every code, M={m} {dtype} {layout}"] = functools.partial(every_code, m, dtype, layout)
    for m in (4, 32, 200):
        every[f"x from 2^-100 to 2^100, M={m}"] = functools.partial(error, m, 512, 1024, torch.bfloat16, 100)
        every[f"NaN scales, M={m}"] = functools.partial(nan_rows, m)
        every[f"as near as cuBLAS, M={m}"] = functools.partial(against_cublas, m, 1024, 8192)
    return every


def verify_part(part: int, parts: int, out: Path) -> None:
    every = checks()
    names = sorted(every)[part::parts]
    wrong, worst = 0, 0.0
    for name in names:
        out.write_text(json.dumps({"running": name}))
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        try:
            found = every[name]()
        except FAILURES as failure:
            found = float("nan")
            print(f"FAIL {name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
        if found <= WORST_ERROR:
            worst = max(worst, found)
        else:
            wrong += 1
            print(f"WRONG {name}: {found}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    out.write_text(json.dumps({"of": len(names), "wrong": wrong, "worst": worst}))


def verify_all(folder: Path) -> dict[str, Any]:
    """By as many processes as there are cores: compiling takes longest."""
    workers = min(15, os.cpu_count() or 1)
    command = [sys.executable, __file__, str(folder), "--part"]
    processes = [subprocess.Popen([*command, str(i), str(workers)]) for i in range(workers)]
    total: dict[str, Any] = {"of": 0, "wrong": 0, "worst": 0.0}
    for i, process in enumerate(processes):
        part = folder / f"part{i}"
        died = process.wait() != 0
        found = json.loads(part.read_text()) if part.exists() else {}
        if died:
            print(f"DIED in {found.get('running')}", flush=True)
            found = {"of": 0, "wrong": 1, "worst": 0.0}
        part.unlink(missing_ok=True)
        total = {"of": total["of"] + found["of"], "wrong": total["wrong"] + found["wrong"], "worst": max(total["worst"], found["worst"])}
    print(f"{total['wrong']} of {total['of']} checks wrong, worst error {total['worst']:.1e}", flush=True)
    return total


def measure(n: int, k: int, rows: tuple[int, ...], tiles: bool) -> Iterator[dict[str, Any]]:
    copies = -(-200_000_000 // (n * k * 9 // 16)) + 1
    plain = [random_weight(n, k, seed) for seed in range(copies)]
    tiled = [lay_out_ref(*w, "tiled") for w in plain]
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(-(-200_000_000 // (n * k * 2)) + 1)]
    int4 = [int4_weight(n, k) for _ in range(copies)]
    scale = torch.rand((), device="cuda")
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        quantized = (*random_weight(m, k, 1), torch.rand(m, device="cuda"))
        calls: dict[str, list[Callable[[], object]]] = {
            "cublas": [functools.partial(torch.nn.functional.linear, x, w) for w in dense],
            "w4a16": [functools.partial(MM, x, None, None, *w, scale, None, k, torch.bfloat16, b_layout="tiled") for w in tiled],
        }
        if m <= 16:
            calls["torch int4"] = [functools.partial(torch._weight_int4pack_mm, x, w[0], 128, w[1]) for w in int4]
        if m in (1, 64, 4096):
            calls["w4a4 tiled"] = [functools.partial(MM, *quantized, *w, scale, None, k, torch.bfloat16, b_layout="tiled") for w in tiled]
            calls["w4a4 plain"] = [functools.partial(MM, *quantized, *w, scale, None, k, torch.bfloat16) for w in plain]
        if m == 4096:
            calls["w4a4 tiled, quantize included"] = [functools.partial(quantize_and_multiply, x, w, scale, k) for w in tiled]
        for tile in other_choices(m) if tiles else ():
            calls[f"{tile}"] = [functools.partial(decode_mm, x, *w, scale, None, torch.bfloat16, n=n, tile=tile) for w in tiled]
        times = {name: microseconds(each, torch.device("cuda"), QUICK) for name, each in calls.items()}
        floor = max((n * k * 9 / 16 + 2 * m * (n + k)) / 3.0e6, 2e-6 * m * n * k / 990)
        print(f"{n}x{k} M={m}: cuBLAS {times['cublas']:.1f}, floor {floor:.1f}, {choose_tile(m, n, k, True)}", flush=True)
        for name, time in times.items():
            if name != "cublas":
                print(f"   {time:8.1f} {times['cublas'] / time:5.2f}x {name}", flush=True)
        yield {"n": n, "k": k, "m": m, "floor": floor, "microseconds": times}


def other_choices(m: int) -> tuple[DecodeTile, ...]:
    """What the choice of a tile should be checked against."""
    if m <= 8:
        warps = ((1, 4), (2, 2), (2, 4), (4, 2))
        return tuple(NarrowTile(row_tiles=rows, warps_r=r, warps_k=k) for rows, (r, k) in itertools.product((1, 2), warps))
    fitting = tuple(tile for tile in REGISTER_TILES if m // 2 < tile.block_m <= 2 * m or tile.block_m == 128 <= m)
    return (*fitting, *(TILES if 64 < m < 512 else ()), *(HALF_TILES if m >= 256 else ()))


def quantize_and_multiply(x: Tensor, weight: tuple[Tensor, Tensor], scale: Tensor, k: int) -> Tensor:
    """W4A4 as an inference graph has it: a scale a row."""
    a = ops.QUANTIZE(x, -1, *ops.quantize_args(QuantConfig(global_scale=GlobalScale.ROW)))
    return MM(*a, *weight, scale, None, k, torch.bfloat16, b_layout="tiled")


def measure_training(m: int, n: int, k: int) -> dict[str, Any]:
    """Both operands plain, with a scale each, as a training step has them; larger than L2."""
    a, b, scale = random_weight(m, k, 1), random_weight(n, k, 2), torch.rand((), device="cuda")
    x, dense = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, list[Callable[[], object]]] = {
        "cublas": [functools.partial(torch.nn.functional.linear, x, dense)] * 2,
        "w4a4 plain": [functools.partial(MM, *a, scale, *b, scale, None, k, torch.bfloat16)] * 2,
    }
    times = {name: microseconds(each, torch.device("cuda"), QUICK) for name, each in calls.items()}
    print(f"training {m}x{n}x{k}: cuBLAS {times['cublas']:.1f}, {times['cublas'] / times['w4a4 plain']:.2f}x", flush=True)
    return {"n": n, "k": k, "m": m, "floor": 2e-6 * m * n * k / 990, "microseconds": times}


def host_microseconds(m: int) -> float:
    """What a call costs the host, for a product of so few rows that the GPU keeps up with it."""
    import time

    weight = lay_out_ref(*random_weight(4096, 4096, 0), "tiled")
    x, scale = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16), torch.rand((), device="cuda")
    call = functools.partial(MM, x, None, None, *weight, scale, None, 4096, torch.bfloat16, b_layout="tiled")
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(300):
        call()
    return (time.perf_counter() - start) / 300 * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--host", action="store_true", help="only what calls cost the host")
    parser.add_argument("--rows", type=lambda text: tuple(int(m) for m in text.split(",")), default=ROWS)
    parser.add_argument("--part", type=int, nargs=2, help="used by the script itself")
    given = parser.parse_args()
    if given.part:
        part, parts = given.part
        verify_part(part, parts, given.folder / f"part{part}")
        return 0
    host = {m: host_microseconds(m) for m in HOST_ROWS}
    print("a call costs the host " + ", ".join(f"{us:.0f} us (M={m})" for m, us in host.items()), flush=True)
    if given.host:
        return 0
    head = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": str(datetime.datetime.now(tz=datetime.UTC).date()), "checks": verify_all(given.folder),
        "host_microseconds": host,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [measure_training(*shape) for shape in TRAINING]
    for n, k in SHAPES:
        for row in measure(n, k, given.rows, given.tiles):
            rows.append(row)
            (given.folder / "matmul.json").write_text(json.dumps(head | {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
