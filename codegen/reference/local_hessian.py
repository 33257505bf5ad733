"""Block scales by the error of the layer's output: a sweep whose loss is d H d^T in each block of 16 channels, H = E[x x^T] of its inputs.

What ModelOpt calls `local_hessian`. Codes stay the nearest ones. Correlations between blocks are left out; GPTQ (`gptq.py`) uses them all.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig, ScaleRule, round_up
from fp4compile.codegen.reference.e2m1 import pack_ref
from fp4compile.codegen.reference.gptq import UnusableMoments, rotated, rotated_moments, usable
from fp4compile.codegen.reference.scale_search import Metric, quantize_by_search_ref

_WHERE: Final = "local_hessian"


def local_hessian_ref(weight: Tensor, moments: Tensor, config: QuantConfig, *, damping: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and global scale, as `quantize_ref` gives them, of `weight` (..., N, K) whose input has second `moments` (K, K).

    Their diagonal blocks (ceil(K/16), 16, 16), padded with zeros, are enough, unless `config` rotates more than 16 channels at once.
    `config` has scale_rule = sweep, in any format with e4m3 scales. Raises `UnusableMoments`.
    """
    assert config.scale_rule is ScaleRule.SWEEP
    k = round_up(weight.shape[-1], config.k_multiple)
    blocks = (_given_blocks if moments.ndim == 3 else _blocks_of)(moments, weight.shape[-1], k, config)
    codes, scales, decode = quantize_by_search_ref(rotated(weight, k, config), config, metric=_output_error(blocks, damping))
    return pack_ref(codes), scales, decode


def _blocks_of(moments: Tensor, given: int, k: int, config: QuantConfig) -> Tensor:
    h = rotated_moments(usable(moments, (given, given), _WHERE), k, config)
    return h.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _given_blocks(blocks: Tensor, given: int, k: int, config: QuantConfig) -> Tensor:
    """(k/16, 16, 16) of the rotated input."""
    count = round_up(given, 16) // 16
    if config.hadamard > 16:
        found = f"are those of blocks of 16 channels, and hadamard = {config.hadamard} mixes more"
        raise UnusableMoments(where=_WHERE, found=found, needed='all are needed: moments = "full"')
    blocks = F.pad(usable(blocks, (count, 16, 16), _WHERE), (0, 0, 0, 0, 0, k // 16 - count))
    return rotated(rotated(blocks, 16, config).mT.contiguous(), 16, config)


def _output_error(blocks: Tensor, damping: float) -> Metric:
    """Loss d H d^T of each block, H that of its column in `blocks` (B, 16, 16), damped by a share of the mean of all diagonals."""
    added = damping * blocks.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(16, device=blocks.device, dtype=torch.float64)
    factor = torch.linalg.cholesky(blocks.double() + added).float()

    def loss(difference: Tensor) -> Tensor:
        seen = difference.permute(2, 1, 0) @ factor  # (B, R, 16)
        return (seen * seen).sum(-1).mT

    return loss
