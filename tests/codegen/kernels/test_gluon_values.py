"""The values of the Hopper kernels, from their own source over a stand-in for Gluon: every bit, whichever program computes which tile."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the stand-in takes compiled functions apart", allow_module_level=True)

from fp4compile.codegen.kernels.half_hopper_mm import half_hopper_mm_kernel
from fp4compile.codegen.kernels.register_mm import register_mm_kernel
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from tests.codegen.kernels.exact_products import exact_side
from tests.codegen.kernels.gluon_stand_in import Descriptor, Pointer, on_the_cpu


def turned(word: Tensor, left: int) -> Tensor:
    wide = word.long() & 0xFFFFFFFF
    return (wide << left | wide >> (32 - left)) & 0xFFFFFFFF


def tiled_pair(first: Tensor, second: Tensor, pair: int, fp16: bool) -> Tensor:
    """Bits of two bfloat16, 2^-126 times the codes, in an int32."""
    word = first if pair in (0, 2, 5) else second if pair in (1, 3, 6) else (first & 0x06030603) | (second & ~0x06030603)
    return (turned(word, 2 * pair) & 0x81C081C0).to(torch.int32)


def multiply_pairs(a: Tensor, b: Tensor, fp16: bool) -> Tensor:
    left, right = (x.contiguous().view(torch.bfloat16) for x in (a, b))
    return (left * right).view(torch.int32)


def by_block(two: Tensor, fp16: bool) -> Tensor:
    """Pairs of equal bfloat16, 2^118 times the e4m3 in each of the two low bytes."""
    bytes_ = torch.stack((two & 0xFF, two >> 8 & 0xFF), -1).to(torch.uint8)
    value = (bytes_.view(torch.float8_e4m3fn).float() * 2.0**118).bfloat16()
    return torch.stack((value, value), -1).view(torch.int32)[..., 0]


REPLACED: dict[str, Any] = {"_tiled_pair": tiled_pair, "_multiply_pairs": multiply_pairs, "_by_block": by_block}


def order_of_lanes(x: Tensor, chunks: int) -> Tensor:
    """As `pair_columns_kernel` documents it: [block and its 8-code half, u, c, lane t, e] takes column 32 t + 8 j + 4 u + 2 c + e."""
    padded = torch.zeros(x.shape[0], 128 * chunks, dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    return padded.view(-1, chunks, 4, 4, 2, 2, 2).permute(0, 1, 3, 4, 5, 2, 6).reshape(padded.shape).contiguous()


@pytest.mark.parametrize(("groups", "block_m", "stages", "splits"), [(1, 16, 6, 1), (2, 32, 2, 3), (4, 128, 4, 1), (4, 128, 4, 2)])
def test_weights_decoded_in_registers(groups: int, block_m: int, stages: int, splits: int) -> None:
    m, n, k = 2 * block_m + 5, 64 * groups + 48, 1040
    generator = torch.Generator().manual_seed(groups)
    x, weight = exact_side("bf16", (m, k), generator).data, exact_side("nvfp4", (n, k), generator, global_scale="row")
    assert weight.scales is not None and weight.global_scale is not None
    bias = torch.randn(n, generator=generator)
    codes, scales = lay_out_ref(weight.data, weight.scales, "tiled")
    tiles, chunks, _ = codes.shape
    words = (codes.view(torch.int32).view(tiles, 8 * chunks, 32), scales.view(torch.int32).view(tiles, chunks, 32))
    paired = order_of_lanes(x, chunks)
    a_split = -(-chunks // splits)
    out = torch.full((splits, m, n), float("nan"))
    last = (None, Pointer(weight.global_scale), Pointer(bias)) if splits == 1 else (None, None, None)
    descriptors = (
        Descriptor(paired, [block_m, 64]), Descriptor(words[0], [4 * groups, 8, 32]), Descriptor(words[1], [4 * groups, 1, 32])
    )  # fmt: skip
    for split, program in ((s, p) for s in range(splits) for p in range(2)):  # two programs for six tiles
        run = on_the_cpu(register_mm_kernel, (program, split), 2, REPLACED)
        run(
            *descriptors, *last, Pointer(out.view(-1)), m, n, chunks, a_split, 0, 1, m * n, BLOCK_M=block_m, GROUPS=groups,
            STAGES=stages, FP16=False, BAND=2, PDL=True, MULTIPLY_REGISTERS=0, LOAD_REGISTERS=0,
        )  # fmt: skip
    want = scaled_mm_ref(x, None, None, weight.data, weight.scales, weight.global_scale, bias, k, torch.float32)
    got = out[0] if splits == 1 else out.sum(0) * weight.global_scale + bias
    assert torch.equal(got, want)


@pytest.mark.parametrize("stored_by", ["copy engine", "threads"])
def test_halves(stored_by: str) -> None:
    m, n, k, block_m, block_n = 300, 520, 200, 128, 256
    generator = torch.Generator().manual_seed(1)
    a, b = (exact_side("nvfp4", shape, generator, global_scale="row") for shape in ((m, k), (n, k)))
    assert a.scales is not None and b.scales is not None and a.global_scale is not None and b.global_scale is not None
    bias = torch.randn(n, generator=generator)
    out = torch.full((m, n), float("nan"))
    values = [dequantize_ref(*each)[:, :k].bfloat16() for each in ((a.data, a.scales), (b.data, b.scales))]
    stored = Descriptor(out, [block_m // 2, 64]) if stored_by == "copy engine" else None
    for program in range(2):
        run = on_the_cpu(half_hopper_mm_kernel, (program, 0), 2, {})
        run(
            Descriptor(values[0], [block_m, 64]), Descriptor(values[1], [block_n, 64]), stored, Pointer(a.global_scale),
            Pointer(b.global_scale), Pointer(bias), Pointer(out.view(-1)), m, n, k, 1, 1, BLOCK_M=block_m, BLOCK_N=block_n,
            STAGES=4, BAND=2, MULTIPLY_REGISTERS=0, LOAD_REGISTERS=0,
        )  # fmt: skip
    assert torch.equal(out, scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, torch.float32))
