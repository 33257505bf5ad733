"""Whether a quantizer agrees with the reference in every bit: on a sample of hard values, and on parts of the tensor that is timed.

Large tensors are cut up in other ways than small ones, so a sample alone would not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fp4compile.bench.case import QuantizeCase
from fp4compile.bench.ours import Quantized, dense_weight, quantize_call, seed_on
from fp4compile.bench.verify import Verdict
from fp4compile.codegen.formats import GlobalScale, QuantConfig, Rounding
from fp4compile.codegen.reference.block import quantize_ref

_SAMPLE: Final = (384, 1024)
_PART: Final = 64  # rows of what is quantized, whole 16x16 blocks
_NAMES: Final = ("codes", "scales", "global scale")
Compared = tuple[str, Tensor, Tensor]  # name, found, expected


@torch.no_grad()
def verify_quantize(case: QuantizeCase, device: torch.device) -> Verdict:
    seed = seed_on(device)
    sample, timed = _hard_sample(case), dense_weight(case.rows, case.columns, device, 0)
    for name, found, expected in _sample_bits(case, sample.to(device), seed):
        if wrong := _difference(name, found, expected):
            return Verdict(wrong=wrong, errors={})
    for name, found, expected in _part_bits(case, timed, seed):
        if wrong := _difference(name, found, expected):
            return Verdict(wrong=f"{wrong}, in the tensor that is timed", errors={})
    return Verdict(wrong="", errors={})


def _difference(name: str, found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{name}: {found.dtype} {tuple(found.shape)} where the reference has {expected.dtype} {tuple(expected.shape)}"
    different = int((_bits(found.cpu()) != _bits(expected)).sum())
    return f"{name}: {different} of {found.numel()} differ from the reference" if different else ""


def _sample_bits(case: QuantizeCase, x: Tensor, seed: Tensor) -> Iterator[Compared]:
    for label, config, axis, copy in _copies(case, x, seed):
        expected = quantize_ref(x.cpu(), config, axis=axis, seed=seed.cpu())
        yield from zip((f"{name}{label}" for name in _NAMES), copy, expected, strict=True)


def _part_bits(case: QuantizeCase, x: Tensor, seed: Tensor) -> Iterator[Compared]:
    """First, middle and last rows, by the scale of the whole. What draws by position or rotates the whole is left to the sample."""
    for label, config, axis, copy in _copies(case, x, seed):
        if config.rounding is Rounding.STOCHASTIC or config.hadamard:
            continue
        matrix = x if axis == -1 else x.mT
        if config.global_scale is GlobalScale.TENSOR and config.fmt.has_global_scale:
            config = replace(config, global_scale=GlobalScale.STATIC, static_amax=float(x.abs().max()))
        codes, scales, global_scale = copy
        last = max(len(matrix) - _PART, 0) // 16 * 16
        for start in sorted({0, last // 2 // 16 * 16, last}):
            rows = slice(start, start + _PART)
            scale = global_scale[rows] if config.global_scale is GlobalScale.ROW else global_scale
            expected = quantize_ref(matrix[rows].cpu().contiguous(), config)
            yield from zip((f"{name}{label}" for name in _NAMES), (codes[rows], scales[rows], scale), expected, strict=True)


def _copies(case: QuantizeCase, x: Tensor, seed: Tensor) -> Iterator[tuple[str, QuantConfig, int, Quantized]]:
    """(label, how, axis, codes and scales) of each copy that a case writes."""
    found = quantize_call(case, x, seed)()
    assert isinstance(found, tuple)
    axes = (-1, -2) if case.axis is None else (case.axis,)
    for i, (axis, config) in enumerate(zip(axes, case.configs, strict=True)):
        codes, scales, global_scale = found[3 * i : 3 * i + 3]
        yield " of columns" if i else "", config, axis, (codes, scales, global_scale)


def _hard_sample(case: QuantizeCase) -> Tensor:
    """bfloat16 with ties, zeros, tiny and huge blocks, and where a scale is shared by few a NaN and an Inf."""
    rows, columns = min(case.rows, _SAMPLE[0]), min(case.columns, _SAMPLE[1])
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x[1::7] = torch.randint(-12, 13, x[1::7].shape, generator=generator) / 2.0
    x[2::11], x[3::13] = 0.0, -0.0
    x[4::17] *= 2.0**-60
    x[5::19] *= 2.0**40 if case.config.global_scale is GlobalScale.ROW else 30.0
    x[:, -3:] = 6.0
    if not any(config.hadamard for config in case.configs):
        x[rows // 2, columns // 2], x[rows // 3, 0] = float("nan"), float("-inf")
    return x.bfloat16()


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.uint8)
