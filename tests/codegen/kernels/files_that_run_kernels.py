"""Tests that run Triton kernels, the longest first: on a GPU as they are, without one in processes that interpret, short ones together."""

from __future__ import annotations

from itertools import chain

PROCESSES = (
    ("test_quantize_exact.py",),
    ("test_weight_products.py",),
    ("test_scaled_mm.py", "test_grouped.py", "test_flagged_mm.py"),
    ("test_native_mm.py", "test_native_grouped.py"),
    ("test_quantize_residual_exact.py",),
)
FILES = tuple(chain.from_iterable(PROCESSES))
