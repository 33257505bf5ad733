"""Tensors that make a quantizer err, and the words for where it did. Shared by the exactness tests and `perf/check_device.py`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

DISTRIBUTIONS = (
    "normal", "integers", "heavy_tail", "block_range", "row_range", "outlier", "tiny", "subnormal", "huge", "zeros", "non_finite", "bits",
)  # fmt: skip


def hard_matrix(name: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """float32 (rows, columns) of the named distribution, on the generator's device."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    x = normal(rows, columns)
    if name == "integers":
        x = (x * 4).round()  # meets the ties of e2m1 and e4m3
    elif name == "heavy_tail":
        x = x / uniform(1e-3, 1, rows, columns)
    elif name == "block_range":
        x = x * torch.exp2(uniform(-20, 0, rows, -(-columns // 16))).repeat_interleave(16, 1)[:, :columns]
    elif name == "row_range":
        x = x * torch.exp2(uniform(-12, 3, rows, 1).round())
    elif name == "outlier":
        x[rows // 2, columns // 3] = 1e8  # the other blocks' scales underflow
    elif name in ("tiny", "subnormal", "huge"):
        x = x * {"tiny": 1e-37, "subnormal": 1e-42, "huge": 1e37}[name]
    elif name == "zeros":
        x = torch.where(uniform(0, 1, rows, columns) < 0.5, 0.0, -0.0)
    elif name == "non_finite":
        pick = torch.randint(0, 200, (rows, columns), generator=generator, device=device)
        for value, number in enumerate((float("nan"), float("inf"), -float("inf"))):
            x = torch.where(pick == value, number, x)
    elif name == "bits":
        random = torch.randint(-(2**31), 2**31, (rows, columns), generator=generator, device=device)
        x = random.to(torch.int32).view(torch.float32)
    return x


def hard_batch(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, names: tuple[str, ...] = DISTRIBUTIONS
) -> Tensor:  # fmt: skip
    """(len(names), rows, columns): one matrix of each distribution, so that each has its own global scale."""
    return torch.stack([hard_matrix(name, rows, columns, generator).to(dtype) for name in names])


def first_differences(got: Tensor, want: Tensor, limit: int = 4) -> str:
    """Empty where both agree in dtype, shape and every bit; else how many differ and the first coordinates with both values."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    if got.numel() == 0:
        return ""
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    differ = got.contiguous().view(as_bits) != want.contiguous().view(as_bits)
    count = int(differ.sum())
    if not count:
        return ""
    coordinates = differ.nonzero()[:limit].tolist()
    pairs = [(tuple(c), _show(got[tuple(c)]), _show(want[tuple(c)])) for c in coordinates]
    listed = "; ".join(f"{c}: got {g}, want {w}" for c, g, w in pairs)
    return f"{count} of {got.numel()} differ, {listed}"


def assert_same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Of codes, scales and global scale; what a kernel gives is contiguous."""
    for name, g, w in zip(("codes", "scales", "global_scale"), got, want, strict=True):
        assert g.is_contiguous()
        assert not first_differences(g, w.contiguous()), f"{name}: {first_differences(g, w.contiguous())}"


def _show(value: Tensor) -> str:
    if value.dtype in (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return f"0x{value.view(torch.uint8).item():02x}"
    bits = value.view({2: torch.int16, 4: torch.int32}[value.element_size()]).item() & (1 << 8 * value.element_size()) - 1
    return f"{value.item()!r} (0x{bits:x})"


def same_nan(x: Tensor) -> Tensor:
    """`x` with every NaN replaced by one: which NaN arithmetic returns is the hardware's business."""
    return torch.where(torch.isnan(x), float("nan"), x)


def all_quantizations() -> list[dict[str, object]]:
    """Every legal combination of the options that change the arithmetic, as keyword arguments of `QuantConfig`."""
    hadamards, roundings = (0, 16, 32, 64, 128), ("nearest", "stochastic")
    configs: list[dict[str, object]] = []
    for global_scale, hadamard in itertools.product(("tensor", "row", "static"), hadamards):
        static = {"static_amax": 3.0} if global_scale == "static" else {}
        row = {"global_scale": global_scale, "hadamard": hadamard, **static}
        configs += [row | {"rounding": rounding} for rounding in roundings]
        configs += [row | {"scale_rule": rule} for rule in ADAPTIVE]
    for global_scale, static in (("tensor", {}), ("static", {"static_amax": 3.0})):
        tile = {"block": "16x16", "global_scale": global_scale, **static}
        configs += [tile | {"rounding": rounding} for rounding in roundings]
        configs += [tile | {"scale_rule": rule} for rule in ADAPTIVE]
    configs += [{"format": "mxfp4", "rounding": r, "hadamard": h} for r, h in itertools.product(roundings, hadamards)]
    wide = {"scale_rule": "amax_17_16", "rounding": "stochastic"}
    configs += [wide, wide | {"hadamard": 16}, wide | {"global_scale": "row"}, wide | {"block": "16x16"}]
    eden = {"rounding": "eden", "hadamard": 128}
    configs += [
        eden,
        eden,
        eden | {"global_scale": "row"},
        {"rounding": "eden"},
        {"rounding": "eden", "global_scale": "static", "static_amax": 3.0},
    ]
    return configs


ADAPTIVE = ("four_over_six", "four_over_six_mae", "four_over_six_absmax")
