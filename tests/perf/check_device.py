"""All fp4 kernels on the GPU at hand: every bit of quantize against the reference, every product against float64.

Run `python tests/perf/check_device.py FOLDER`; no installation is needed. It prints each failure with its first differing coordinate
and both values, then a table, and writes results.json into FOLDER. Sections run in processes of their own, so that a crashed CUDA
context ends one of them only. `--device cpu` with TRITON_INTERPRET=1 is a dry run on tiny tensors.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.perf.linked_package import link_package

_PACKAGE = link_package()

from fp4compile.codegen.formats import QuantConfig  # noqa: E402 (after link_package)
from fp4compile.codegen.kernels import launch  # noqa: E402
from fp4compile.codegen.ops import quantize_args  # noqa: E402
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref  # noqa: E402
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref  # noqa: E402
from fp4compile.codegen.reference.hadamard import hadamard_ref  # noqa: E402
from fp4compile.codegen.reference.matmul import scaled_mm_ref  # noqa: E402
from tests.codegen.kernels.exact_products import HIGH_PRECISION, KINDS, exact_side  # noqa: E402
from tests.codegen.kernels.hard_inputs import DISTRIBUTIONS, all_quantizations, first_differences, hard_batch, same_nan  # noqa: E402
from tests.perf.failures import FAILURES  # noqa: E402

# Compiling takes longer than running, and uses one core a process.
SHARDS = {"quantize": 10, "hadamard": 1, "exact_products": 4, "products": 2, "grouped": 1}
SECTIONS = [f"{kind} {shard}" for kind, shards in SHARDS.items() for shard in range(shards)]
# A compiler's race that this found was lost in one run of four, by one tile of 128.
RUNS = 20
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
Check = tuple[str, Callable[[], dict[str, Any]]]  # name, and what returns {"failure": text or "", ...measurements}


def quantize_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Every combination of options on every hard distribution, aligned and ragged; the plain ones in every dtype and axis."""
    for i, options in enumerate(all_quantizations()):
        plain = options.get("hadamard", 0) in (0, 16) and options.get("global_scale", "tensor") == "tensor"
        cases = [(d, a) for d in DTYPES for a in (-1, -2)] if plain else [(DTYPES[i % 3], -1 - i // 3 % 2)]
        for dtype, axis in cases:
            for rows, columns in ((16, 64), (17, 35)) if small else ((512, 2048), (509, 1037)):
                name = f"quantize {options} {str(dtype)[6:]} axis {axis} {rows}x{columns}"
                yield name, lambda o=options, d=dtype, a=axis, r=rows, c=columns, s=i: check_quantize(device, o, d, a, r, c, s)


def check_quantize(
    device: torch.device, options: dict, dtype: torch.dtype, axis: int, rows: int, columns: int, seed: int
) -> dict[str, Any]:  # fmt: skip
    x = hard_batch(rows, columns, dtype, torch.Generator(device).manual_seed(seed))
    config = QuantConfig(**options)
    seed_tensor = torch.tensor(-(3**30) - seed, dtype=torch.int64, device=device)
    got = launch.quantize(x, axis, *quantize_args(config), seed_tensor)
    want = quantize_ref(x, config, axis=axis, seed=seed_tensor)
    found = []
    for name, g, w in zip(("codes", "scales", "global_scale"), got, want, strict=True):
        text = first_differences(g, w.contiguous())
        if text:
            per_matrix = [n for i, n in enumerate(DISTRIBUTIONS) if first_differences(g[i], w[i])]
            found.append(f"{name}: {text} (first index: {', '.join(per_matrix)}){_inputs_of(g, w, x if axis == -1 else x.mT)}")
    return {"failure": " | ".join(found), "elements": x.numel()}


def _inputs_of(got: Tensor, want: Tensor, x: Tensor) -> str:
    """The 32 inputs around the first differing code or scale, before any rotation, and the largest finite input of its matrix."""
    if got.ndim < 3:
        return ""
    matrix, row, column = (got.view(torch.uint8) != want.view(torch.uint8)).nonzero()[0].tolist()
    start = column * x.shape[2] // got.shape[2] // 32 * 32
    finite = torch.where(x[matrix].isfinite(), x[matrix].abs(), 0)
    return f", inputs [{matrix}, {row}, {start}:] {x[matrix, row, start : start + 32].tolist()}, amax {finite.max().item()!r}"


def hadamard_checks(device: torch.device, small: bool) -> Iterator[Check]:
    for size in (16, 32, 64, 128):
        for dtype in DTYPES:
            for axis in (-1, -2):
                yield (
                    f"hadamard {size} {str(dtype)[6:]} axis {axis}",
                    lambda s=size, d=dtype, a=axis: check_hadamard(device, s, d, a, small),
                )


def check_hadamard(device: torch.device, size: int, dtype: torch.dtype, axis: int, small: bool) -> dict[str, Any]:
    x = hard_batch(*((17, 35) if small else (509, 1037)), dtype, torch.Generator(device).manual_seed(size))
    moved = x if axis == -1 else x.mT
    want = hadamard_ref(torch.nn.functional.pad(moved, (0, -moved.shape[-1] % size)), size)
    want = want if axis == -1 else want.mT
    return {"failure": first_differences(same_nan(launch.hadamard(x, axis, size)), same_nan(want.contiguous())), "elements": x.numel()}


def exact_product_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Integers in disguise: float32 sums them exactly, so the product must equal the reference bit for bit, and every time."""
    shapes = [(3, 20, 40)] if small else [(1, 4096, 4096), (16, 1000, 4096), (33, 515, 1007), (200, 300, 130), (1024, 2048, 4096)]
    for left in KINDS:
        for right in KINDS:
            for m, n, k in shapes:
                for out in (torch.float32, torch.bfloat16):
                    name = f"exact product {left} x {right} {m}x{n}x{k} -> {str(out)[6:]}"
                    yield name, lambda le=left, r=right, s=(m, n, k), o=out: check_exact_product(device, le, r, s, o)


def check_exact_product(device: torch.device, left: str, right: str, shape: tuple[int, int, int], out: torch.dtype) -> dict[str, Any]:
    m, n, k = shape
    generator = torch.Generator(device).manual_seed(m + n + k)
    a, b = exact_side(left, (m, k), generator, global_scale="row"), exact_side(right, (n, k), generator, global_scale="tensor")
    bias = torch.randn(n, generator=generator, device=device)
    want = scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, out)
    wrong = []
    for _ in range(1 if device.type == "cpu" else RUNS):
        text = first_differences(launch.scaled_mm(*a.arguments(), *b.arguments(), bias, k, out), want)
        wrong += [text] if text else []
    return {"failure": f"{len(wrong)} of {RUNS} runs, the first: {wrong[0]}" if wrong else ""}


def product_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Real values against float64; the competitor is the reference, a float32 matmul without TF32."""
    shapes = [(3, 20, 40)] if small else [(1, 4096, 4096), (16, 14336, 4096), (64, 4096, 14336), (300, 1001, 999), (2048, 4096, 4096)]
    for left in ("nvfp4", "mxfp4", *HIGH_PRECISION):
        for right in ("nvfp4", "mxfp4"):
            for shape in shapes:
                name = f"product {left} x {right} {'x'.join(map(str, shape))}"
                yield name, lambda le=left, r=right, s=shape: check_product(device, le, r, s)


def check_product(device: torch.device, left: str, right: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    m, n, k = shape
    generator = torch.Generator(device).manual_seed(k)
    a, left_values = _quantized(left, torch.randn(m, k, generator=generator, device=device), k)
    b, right_values = _quantized(right, torch.randn(n, k, generator=generator, device=device) * 0.02, k)
    exact = left_values @ right_values.mT
    got = launch.scaled_mm(*a, *b, None, k, torch.float32)
    reference = scaled_mm_ref(*a, *b, None, k, torch.float32)
    error, competitor = (got.double() - exact).abs(), (reference.double() - exact).abs()
    # Products are exact (float32 operands: one rounding more); tensor cores may truncate each of K additions.
    bound = (k + 8) * 2.0**-23 * (left_values.abs() @ right_values.abs().mT)
    worst = (error / bound.clamp(min=1e-300)).argmax()
    failure = ""
    if not (error <= bound).all():
        at = divmod(int(worst), n)
        failure = f"at {at}: got {got[at].item()!r}, float64 {exact[at].item()!r}, reference {reference[at].item()!r}"
    elif not torch.equal(launch.scaled_mm(*a, *b, None, k, torch.bfloat16), got.bfloat16()):
        failure = "bfloat16 output is not the float32 output rounded once"
    scale = exact.square().mean().sqrt()
    rms = {"rms_error": error.square().mean().sqrt() / scale, "competitor": competitor.square().mean().sqrt() / scale}
    return {"failure": failure, **{name: value.item() for name, value in rms.items()}}


def _quantized(kind: str, x: Tensor, k: int) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor]:
    """Arguments of one side and its exact values in float64."""
    if kind in HIGH_PRECISION:
        data = x.to(HIGH_PRECISION[kind])
        return (data, None, None), data.double()
    codes, scales, decode = launch.quantize(x, -1, *quantize_args(QuantConfig(format=kind)), None)
    return (codes, scales, decode), dequantize_ref(codes, scales)[:, :k].double() * decode.double()


def grouped_checks(device: torch.device, small: bool) -> Iterator[Check]:
    total, n, k = (20, 30, 40) if small else (1500, 1030, 1000)
    for left, right in (("nvfp4", "nvfp4"), ("bf16", "nvfp4"), ("mxfp4", "mxfp4"), ("fp16", "nvfp4"), ("fp32", "nvfp4"), ("nvfp4", "bf16")):
        for experts in (1, 3, 8, 64):
            name = f"grouped {left} x {right} {experts} experts"
            yield name, lambda le=left, r=right, e=experts: check_grouped(device, le, r, e, (total, n, k))


def check_grouped(device: torch.device, left: str, right: str, experts: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    total, n, k = shape
    generator = torch.Generator(device).manual_seed(experts)
    a = exact_side(left, (total, k), generator, global_scale="row")
    b = exact_side(right, (experts, n, k), generator, global_scale="row")
    offs = torch.randint(0, total + 1, (experts,), generator=generator, device=device, dtype=torch.int32).sort().values
    got = launch.scaled_grouped_mm(*a.arguments(), *b.arguments(), offs, k, torch.bfloat16)
    return {"failure": first_differences(got, scaled_grouped_mm_ref(*a.arguments(), *b.arguments(), offs, k, torch.bfloat16))}


CHECKS = {
    "quantize": quantize_checks,
    "hadamard": hadamard_checks,
    "exact_products": exact_product_checks,
    "products": product_checks,
    "grouped": grouped_checks,
}


def run_section(section: str, device: torch.device, small: bool, running: Path) -> list[dict[str, Any]]:
    """Run one shard of a section, printing failures as they come; `running` names the check under way, should the process die."""
    kind, shard = section.split()
    results = []
    for number, (name, check) in enumerate(CHECKS[kind](device, small)):
        if number % SHARDS[kind] != int(shard):
            continue
        running.write_text(name)
        start = time.perf_counter()
        try:
            found = check()
        except FAILURES as error:
            lines = traceback.format_exc().strip().splitlines()
            found = {"failure": f"{type(error).__name__}: {str(error)[:1500]} [{' '.join(lines[-8:])[:1500]}]"}
        results.append({"name": name, "seconds": time.perf_counter() - start, **found})
        if found["failure"]:
            print(f"FAIL {name}: {found['failure']}", flush=True)
    return results


def run_all(folder: Path, device: str, small: bool) -> list[dict[str, Any]]:
    """Every section at once, each in its process; one that dies is a failure with its last words."""
    processes = []
    for section in SECTIONS:
        out = result_file(folder, section)
        command = [sys.executable, __file__, str(folder), "--section", section, "--device", device, *(["--small"] if small else [])]
        processes.append((section, out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    results = []
    for section, out, process in processes:
        _, errors = process.communicate()
        if process.returncode == 0:
            done = json.loads(out.read_text())
            print(f"{section}: {len(done)} checks, {sum(r['seconds'] for r in done):.0f} s", flush=True)
            results += done
        else:
            during = out.with_suffix(".running").read_text() if out.with_suffix(".running").exists() else "its start"
            print(f"FAIL {section}: the process ended with {process.returncode} during {during}\n{errors[-3000:]}", flush=True)
            results.append({"name": during, "seconds": 0.0, "failure": f"{section} ended with {process.returncode}: {errors[-3000:]}"})
        for file in (out, out.with_suffix(".running")):
            file.unlink(missing_ok=True)
    return results


def result_file(folder: Path, section: str) -> Path:
    return folder / f"{section.replace(' ', '-')}.json"


def summarize(results: list[dict[str, Any]]) -> None:
    print(f"\n{'section':<16}{'checks':>8}{'failed':>8}{'elements':>16}{'seconds':>9}")
    for kind in ("quantize", "hadamard", "exact product", "product", "grouped"):
        mine = [r for r in results if r["name"].startswith(kind + " ")]
        failed, elements = sum(bool(r["failure"]) for r in mine), sum(r.get("elements", 0) for r in mine)
        print(f"{kind:<16}{len(mine):>8}{failed:>8}{elements:>16,}{sum(r['seconds'] for r in mine):>9.1f}")
    print(f"\n{'relative rms error against float64':<52}{'kernel':>10}{'fp32 matmul':>13}")
    for r in results:
        if "rms_error" in r:
            print(f"{r['name']:<52}{r['rms_error']:>10.2e}{r['competitor']:>13.2e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where results.json goes")
    parser.add_argument("--section", help="one of the sections, with its shard; used by the script itself")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    if device.type == "cpu":
        from tests.codegen.kernels.interpreter_bf16 import teach_bfloat16

        teach_bfloat16()
    if given.section:
        out = result_file(given.folder, given.section)
        out.write_text(json.dumps(run_section(given.section, device, given.small, out.with_suffix(".running"))))
        return 0

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    start = time.perf_counter()
    results = run_all(given.folder, given.device, given.small)
    summarize(results)
    text = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "checks": results}
    (given.folder / "results.json").write_text(json.dumps(text, indent=1))
    failed = sum(bool(r["failure"]) for r in results)
    print(f"\n{len(results)} checks, {failed} failed, {time.perf_counter() - start:.0f} s")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
