"""Weights quantized by the statistics of a calibration: where operators find those, and what they do with them.

A graph names statistics by a text, so that it stays readable and can be cached; the numbers lie here, under names that say their content.
Two calibrations never share a name, so a weight is quantized anew when its statistics change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import QuantConfig, Rounding, ScaleRule, round_up
from fp4compile.codegen.reference.gptq import UnusableMoments, gptq_ref
from fp4compile.codegen.reference.local_hessian import local_hessian_ref
from fp4compile.codegen.reference.residual import in_order_ref

_WORDS_AT_ONCE: Final = 1 << 20


class UnknownStatistics(Fp4CompileError, LookupError):
    template = (
        "fp4::quantize: calibration = {key!r} names statistics that this process has not read. "
        "Load the policy that names their file before you run this graph."
    )


class StaleCalibration(Fp4CompileError, RuntimeError):
    template = (
        "{site}: its weight is not the one that {name} was calibrated with. "
        "Calibrate again after the last change of the weights, or load those of the calibration."
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class InputMoments:
    """Second moments of a layer's input, for one weight.

    blocks: float32 (ceil(K/16), 16, 16), the diagonal blocks of E[x x^T]. full: float32 (K, K), or None where it was not collected.
    checksum: of the weight (..., N, K) that they belong to; None where it is computed from others and may differ in the last bit.
    """

    site: str
    calibration: str  # name of the artefact
    blocks: Tensor
    full: Tensor | None
    checksum: int | None


_KNOWN: Final[dict[str, InputMoments]] = {}


def remember(key: str, moments: InputMoments) -> None:
    """Make `key`, which says their content, the name of `moments` in graphs."""
    _KNOWN.setdefault(key, moments)


def quantize_calibrated(weight: Tensor, config: QuantConfig, key: str, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and global scale of `weight` (..., N, K), with its columns in `order` where one is given (`in_order_ref`).

    Raises `UnknownStatistics`, `StaleCalibration` or `UnusableMoments`.
    """
    known = _KNOWN.get(key)
    if known is None:
        raise UnknownStatistics(key=key)
    if known.checksum is not None and checksum(weight) != known.checksum:
        raise StaleCalibration(site=known.site, name=known.calibration)
    moments = known.blocks if known.full is None else known.full
    if config.rounding is Rounding.GPTQ and known.full is None:
        found = "are those of blocks of 16 channels"
        raise UnusableMoments(where=f"{known.site}: gptq", found=found, needed='all are needed: moments = "full"')
    moments = moments.to(weight.device)
    if order is not None:
        moments = _in_order(moments, order, weight.shape[-1], config, known.site)
        weight = in_order_ref(weight, order, config)
    return quantize_by_moments(weight, moments, config)


def _in_order(moments: Tensor, order: Tensor, k: int, config: QuantConfig, site: str) -> Tensor:
    """Moments of the padded input (Kp, Kp) in the order of its channels, or their diagonal blocks in that of blocks."""
    padded = round_up(k, config.fmt.block)
    by_block = order.numel() < padded
    if moments.ndim == 3 and by_block:
        return moments.index_select(0, order)
    if moments.ndim == 3:
        found = "are those of blocks of 16 channels, and arc with reorder = true puts others into a block"
        raise UnusableMoments(where=site, found=found, needed='all are needed, moments = "full", or reorder = false')
    moments = F.pad(moments, (0, padded - k, 0, padded - k))
    unit = padded // order.numel()
    channels = (order[:, None] * unit + torch.arange(unit, dtype=order.dtype, device=order.device)).flatten()
    return moments.index_select(0, channels).index_select(1, channels)


def quantize_by_moments(weight: Tensor, moments: Tensor, config: QuantConfig, damping: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """The same for given `moments`: (K, K), or the diagonal blocks alone where GPTQ needs no more.

    Of several matrices (..., N, K) each is rounded by itself, for inputs that are taken to be alike.
    """
    plain = replace(config, rounding=Rounding.NEAREST, calibration="of the caller")
    found = None
    if config.scale_rule is ScaleRule.LOCAL_HESSIAN:
        plain = replace(plain, scale_rule=ScaleRule.SWEEP)
        found = local_hessian_ref(weight, moments, plain, damping=damping)
    if config.rounding is Rounding.GPTQ:
        found = _gptq(weight, moments, plain, damping, found)
    assert found is not None, "config.needs_moments"
    return found


def _gptq(
    weight: Tensor, moments: Tensor, config: QuantConfig, damping: float, scaled: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.ndim == 2:
        return gptq_ref(weight, moments, config, damping=damping, quantized=scaled)
    parts = [
        _gptq(each, moments, config, damping, None if scaled is None else (scaled[0][i], scaled[1][i], scaled[2][i]))
        for i, each in enumerate(weight)
    ]
    codes, scales, decode = zip(*parts, strict=True)
    return torch.stack(codes), torch.stack([s.view(torch.uint8) for s in scales]).view(scales[0].dtype), torch.stack(decode)


def checksum(weight: Tensor) -> int:
    """Of the values of `weight` in bfloat16 and their order; the same on every device and for a model that was cast."""
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    flat = weight.detach().flatten()
    for first in range(0, flat.numel(), 4 * _WORDS_AT_ONCE):
        piece = flat[first : first + 4 * _WORDS_AT_ONCE].to(torch.bfloat16)
        words = F.pad(piece, (0, -len(piece) % 4)).view(torch.int64)
        # SplitMix64's mixing of word and place; int64 wraps around on every device.
        mixed = words + torch.arange(first // 4, first // 4 + len(words), device=words.device) * 0x1E3779B97F4A7C15
        mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
        total += (mixed ^ (mixed >> 32)).sum()
    return int(total)
