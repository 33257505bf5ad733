"""Tests that run Triton kernels, the longest first: on a GPU as they are, without one each in a process that interprets."""

from __future__ import annotations

FILES = (
    "test_quantize_exact.py",
    "test_quantize_residual_exact.py",
    "test_scaled_mm.py",
    "test_weight_products.py",
    "test_grouped.py",
    "test_flagged_mm.py",
    "test_native_mm.py",
    "test_native_grouped.py",
)
