"""The second half of a product whose k was split: partial sums added in their order, so that every run gives the same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_splits_kernel(
    partial_ptr, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, n, elements, a_global_stride, b_global_stride,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (M, N) contiguous = the sum of partial (SPLITS, M, N), times the product of the global scales, plus bias (N)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(partial_ptr + at, mask=inside, other=0.0)
    from_ptr = partial_ptr + at
    for _ in tl.static_range(1, SPLITS):
        from_ptr += elements
        total += tl.load(from_ptr, mask=inside, other=0.0)
    row, column = at // n, at % n
    if a_global_ptr is not None:
        scale = tl.load(a_global_ptr + row * a_global_stride, mask=inside, other=0.0)
        if b_global_ptr is not None:
            scale *= tl.load(b_global_ptr + column * b_global_stride, mask=inside, other=0.0)
        total *= scale
    elif b_global_ptr is not None:
        total *= tl.load(b_global_ptr + column * b_global_stride, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
