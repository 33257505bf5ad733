"""The quantize kernels on the GPU at hand: every bit against the reference, then timed beside the bytes that must move.

Run `python tests/perf/time_quantize.py FOLDER [--table] [--quick] [--sweep]`; no installation is needed. Compiling takes longest, some 700
kernels in full, so as many processes as there are cores do it. `--table` checks and times what the table of `docs/quantize.md` shows and no
more, in about a minute; `--quick` checks the timed settings only, `--sweep` times tiles beside the chosen ones. Times are medians from CUDA
graphs over rotating copies larger than L2; the floor is the bytes at the bandwidth of `x.clone()` in the same run. What a tensor's own
scale needs is counted as a second reading of x. Results go to FOLDER/quantize.json.
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
import time
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

from fp4compile.codegen.formats import QuantConfig  # noqa: E402 (after link_package)
from fp4compile.codegen.kernels import launch_quantize, launch_quantize_both  # noqa: E402
from fp4compile.codegen.kernels.launch_quantize import quantize  # noqa: E402
from fp4compile.codegen.kernels.launch_quantize_both import quantize_both  # noqa: E402
from fp4compile.codegen.ops import quantize_args  # noqa: E402
from fp4compile.codegen.reference.block import quantize_ref  # noqa: E402
from fp4compile.codegen.reference.layout import lay_out_ref  # noqa: E402
from fp4compile.codegen.timing import FULL, QUICK, microseconds  # noqa: E402
from tests.codegen.kernels.hard_inputs import all_quantizations, first_differences, hard_batch  # noqa: E402
from tests.perf.failures import FAILURES  # noqa: E402

GPU = torch.device("cuda")
STATIC = {"global_scale": "static", "static_amax": 4.0}
WGRAD = {"hadamard": 16, "rounding": "stochastic"}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# name: (axis, or None for both in one reading, options, options of the column half)
SETTINGS: dict[str, tuple[int | None, dict[str, Any], dict[str, Any]]] = {
    "tensor": (-1, {}, {}),
    "static": (-1, STATIC, {}),
    "row": (-1, {"global_scale": "row"}, {}),
    "tensor h16": (-1, {"hadamard": 16}, {}),
    "row h16": (-1, {"global_scale": "row", "hadamard": 16}, {}),
    "tensor 4/6": (-1, {"scale_rule": "four_over_six"}, {}),
    "row 4/6": (-1, {"scale_rule": "four_over_six", "global_scale": "row"}, {}),
    "tensor 16x16": (-1, {"block": "16x16"}, {}),
    "tensor sr": (-1, {"rounding": "stochastic"}, {}),
    "mxfp4": (-1, {"format": "mxfp4"}, {}),
    "axis -2": (-2, {}, {}),
    "axis -2 h16 sr": (-2, WGRAD, {}),
    "axis -2 mxfp4": (-2, {"format": "mxfp4"}, {}),
    "both": (None, {}, {}),
    "both h16": (None, {}, {"hadamard": 16}),
    "both gradient": (None, {"rounding": "stochastic"}, WGRAD),
    "h32": (-1, {"hadamard": 32}, {}),
    "h64": (-1, {"hadamard": 64}, {}),
    "h128": (-1, {"hadamard": 128}, {}),
}
SHAPES = [(8192, 8192), (4096, 4096), (1, 4096), (8, 4096), (64, 4096), (256, 4096)]
SMALL = ("tensor", "static", "row", "row 4/6", "mxfp4")


def call(name: str, x: Tensor, seed: Tensor, layout: str = "plain") -> Callable[[], tuple[Tensor, ...]]:
    axis, options, column = SETTINGS[name]
    args = quantize_args(QuantConfig(**options))
    if axis is None:
        return lambda: quantize_both(x, args, quantize_args(QuantConfig(**column)), seed, seed, layout, layout)
    return lambda: quantize(x, axis, *args, seed, layout=layout)


def floor_bytes(name: str, elements: int) -> float:
    """x once, and once more for the maximum of a whole tensor; codes and scales of each copy."""
    axis, options, column = SETTINGS[name]
    sides = [QuantConfig(**options)] + ([QuantConfig(**column)] if axis is None else [])
    whole = any(c.fmt.has_global_scale and c.global_scale == "tensor" for c in sides)
    return elements * (2 * (2 if whole else 1) + sum(c.fmt.bits_per_value / 8 for c in sides))


def wrong(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str:
    found = [first_differences(g, w.contiguous()) for g, w in zip(got, want, strict=True)]
    return "; ".join(f for f in found if f)


def reference(x: Tensor, axis: int, options: dict[str, Any], seed: Tensor, layout: str) -> tuple[Tensor, ...]:
    codes, scales, decode = quantize_ref(x, QuantConfig(**options), axis=axis, seed=seed)
    return *lay_out_ref(codes, scales, layout), decode


def shapes(given: argparse.Namespace) -> list[tuple[int, int]]:
    return SHAPES[:1] if given.table else SHAPES


def timed_settings(rows: int) -> tuple[str, ...]:
    return tuple(SETTINGS) if rows >= 1024 else SMALL


def checks(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], tuple[int, str]]]]:
    """(name, what returns how many elements it compared and what differed)."""
    if given.table:
        for name in SETTINGS:
            yield f"{name} plain 512x2048", functools.partial(check_setting, name, "plain", 512, 2048)
        return
    for name, layout, (rows, columns) in itertools.product(SETTINGS, ("plain", "swizzled"), ((512, 2048), (1000, 1040))):
        if layout == "plain" or name in ("tensor", "row", "axis -2", "both", "mxfp4"):
            yield f"{name} {layout} {rows}x{columns}", functools.partial(check_setting, name, layout, rows, columns)
    for rows, name in itertools.product((1, 3, 16, 64), SMALL):
        yield f"{name} {rows}x4096", functools.partial(check_setting, name, "plain", rows, 4096)
    if given.quick:
        return
    for i, options in enumerate(all_quantizations()):
        for (rows, columns), axis in itertools.product(((512, 2048), (509, 1037)), (-1, -2)):
            dtype = DTYPES[(i + rows) % 3]
            name = f"{options} {dtype} axis {axis} {rows}x{columns}"
            yield name, functools.partial(check_options, options, dtype, axis, rows, columns, i)


def check_setting(name: str, layout: str, rows: int, columns: int) -> tuple[int, str]:
    axis, options, column = SETTINGS[name]
    seed = torch.tensor(-(3**30), device="cuda")
    batch = hard_batch(rows, columns, torch.bfloat16, torch.Generator("cuda").manual_seed(1))
    compared, failures = 0, []
    for x in (batch, batch[0].clone()):
        got = call(name, x, seed, layout)()
        want = reference(x, -1 if axis is None else axis, options, seed, layout)
        if axis is None:
            want = (*want, *reference(x, -2, column, seed, layout))
        compared += x.numel() * (2 if axis is None else 1)
        failures.append(wrong(got, want))
    return compared, "; ".join(f for f in failures if f)


def check_options(options: dict[str, Any], dtype: torch.dtype, axis: int, rows: int, columns: int, number: int) -> tuple[int, str]:
    x = hard_batch(rows, columns, dtype, torch.Generator("cuda").manual_seed(number))
    seed = torch.tensor(7 - number, device="cuda")
    got = quantize(x, axis, *quantize_args(QuantConfig(**options)), seed)
    return x.numel(), wrong(got, reference(x, axis, options, seed, "plain"))


Variant = tuple[int, int, int]
# Elements of a tile, warps, programs a multiprocessor; of both axes rows, columns and warps of a region.
VARIANTS = [(elements, warps, programs) for elements, warps in ((4096, 8), (2048, 4), (4096, 4), (8192, 8)) for programs in (8, 16)]
ROW_VARIANTS = [(2048, 4, 8), (4096, 8, 8), (4096, 4, 8), (8192, 8, 8), (8192, 16, 8)]
REGIONS = [(64, 64, 4), (64, 64, 8), (32, 64, 4), (64, 32, 4)]


def variants(name: str) -> list[Variant]:
    axis, options, _ = SETTINGS[name]
    if axis is None:
        return REGIONS
    return ROW_VARIANTS if options.get("global_scale") == "row" else VARIANTS


def use(name: str, variant: Variant) -> None:
    """Make the launchers take `variant` instead of what they would choose."""
    use_chosen()
    if SETTINGS[name][0] is None:
        launch_quantize_both.REGION = (*variant, 4)
        return
    (elements, warps, programs), sizes = variant, {"elements", "warps"}

    def tile(*given: Any, **named: Any) -> Any:
        if named.get("elements") == 8192:  # the maximum's own
            return chosen(*given, **named)
        others = {key: value for key, value in named.items() if key not in sizes}
        return replace(chosen(*given, elements=elements, warps=warps, **({"is_tile": False} | others)), programs=programs)

    chosen = launch_quantize.tile_of
    launch_quantize.tile_of = launch_quantize.tile_of_rows = tile


_CHOSEN = [
    (module, name, getattr(module, name))
    for module, name in ((launch_quantize, "tile_of"), (launch_quantize, "tile_of_rows"), (launch_quantize_both, "REGION"))
]


def use_chosen() -> None:
    for module, name, value in _CHOSEN:
        setattr(module, name, value)
    launch_quantize.plan_of.cache_clear()
    launch_quantize_both._plan_of.cache_clear()


def work(part: int, parts: int, given: argparse.Namespace) -> None:
    """Compile what is numbered `part` modulo `parts` of what will be timed, and compile and check as much; compile the sweep's kernels."""
    compared, failures, seed = 0, [], torch.tensor(1, device="cuda")
    later = [(name, *shape) for shape in shapes(given) for name in timed_settings(shape[0])]
    for name, rows, columns in later[part::parts]:
        try:
            call(name, torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16), seed)()
        except FAILURES as error:
            failures.append(f"{name} {rows}x{columns}: {type(error).__name__}: {str(error)[:400]}")
    for name, check in list(checks(given))[parts - 1 - part :: parts]:  # from the other end, for the last parts had one less
        try:
            count, failure = check()
        except FAILURES as error:
            count, failure = 0, f"{type(error).__name__}: {str(error)[:400]}"
        compared += count
        if failure:
            failures.append(f"{name}: {failure[:400]}")
            print("WRONG", failures[-1], flush=True)
    if given.sweep:
        x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        todo = [(name, v) for name in SETTINGS for v in variants(name) if SETTINGS[name][0] is None or v[2] == 8]
        for name, variant in todo[part::parts]:
            use(name, variant)
            try:
                call(name, x, seed)()
            except FAILURES as error:
                print(f"FAIL {name} {variant}: {str(error)[:200]}", flush=True)
        torch.cuda.synchronize()
    (given.folder / f"part{part}").write_text(json.dumps({"compared": compared, "failures": failures}))


def work_everywhere(given: argparse.Namespace) -> tuple[int, list[str]]:
    """(elements compared, failures) of as many processes as there are cores: compiling takes longest."""
    workers = min(15, os.cpu_count() or 1)
    processes = [subprocess.Popen([sys.executable, *sys.argv, "--part", str(i), str(workers)]) for i in range(workers)]
    compared, failures = 0, []
    for i, process in enumerate(processes):
        if process.wait() == 0:
            found = json.loads((given.folder / f"part{i}").read_text())
            compared, failures = compared + found["compared"], failures + found["failures"]
            (given.folder / f"part{i}").unlink()
        else:
            failures.append(f"process {i} ended with {process.returncode}")
    return compared, failures


def host_microseconds(one: Callable[[], object], count: int = 200) -> float:
    """Time of one call on the host, without waiting for the device."""
    one()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        one()
    passed = time.perf_counter() - start
    torch.cuda.synchronize()
    return passed / count * 1e6


def time_shape(rows: int, columns: int, bandwidth: float, sweep: bool) -> Iterator[dict[str, Any]]:
    copies = max(2, min(64, 200_000_000 // (rows * columns * 2)))
    xs = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    seed = torch.tensor(1, device="cuda")
    big = rows >= 1024
    for name in timed_settings(rows):
        use_chosen()
        floor = floor_bytes(name, rows * columns) / bandwidth
        best = microseconds([call(name, x, seed) for x in xs], GPU, FULL)
        row = {"shape": [rows, columns], "setting": name, "microseconds": best, "floor": floor, "bandwidth": floor / best}
        if not big:
            row["host"] = host_microseconds(call(name, xs[0], seed))
        host = "" if big else f"  host {row['host']:.1f}"
        print(f"{rows}x{columns} {name:<16}{best:9.1f}{floor:9.1f}{floor / best:7.0%}{host}", flush=True)
        yield row
        found = []
        for variant in variants(name) if sweep and rows == 8192 else ():
            use(name, variant)
            try:
                found.append((microseconds([call(name, x, seed) for x in xs], GPU, QUICK), variant))
            except FAILURES as error:
                print(f"  FAIL {variant}: {str(error)[:100]}")
        for best, variant in sorted(found)[:4]:
            print(f"    {best:9.1f} {variant}", flush=True)
        if sweep and rows == 8192:
            yield {"shape": [rows, columns], "setting": name, "sweep": sorted(found)}
    use_chosen()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--part", type=int, nargs=2, help="used by the script itself")
    given = parser.parse_args()
    if given.part:
        work(*given.part, given)
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    compared, failures = work_everywhere(given)
    print(f"{compared / 1e6:.0f} M elements compared, {len(failures)} checks failed", flush=True)
    for failure in failures[:20]:
        print("WRONG", failure)
    big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    bandwidth = 2 * big.nbytes / microseconds([big.clone] * 4, GPU, FULL)
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(f"{device}, copy {bandwidth / 1e6:.2f} TB/s\n{'':<26}{'us':>9}{'floor':>9}")
    rows: list[dict[str, Any]] = []
    for shape in shapes(given):
        for row in time_shape(*shape, bandwidth, given.sweep):
            rows.append(row)
            text = device | {"bandwidth": bandwidth, "compared": compared, "failures": failures, "rows": rows}
            (given.folder / "quantize.json").write_text(json.dumps(text))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
