"""Where the native products can run: the interpreter from Triton 3.9 on, standing for both generations, or a GPU with FP4 tensor cores."""

from __future__ import annotations

import os

import pytest
import torch
import triton

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernels.native_tiles import ARCHITECTURES, architecture_of
from fp4compile.codegen.reference.layout import lay_out_ref
from tests.codegen.kernels.exact_products import Side

if os.environ.get("TRITON_INTERPRET") == "1":
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
        pytest.skip(f"the interpreter of Triton {triton.__version__} has no tl.dot_scaled; 3.9 has", allow_module_level=True)
    HERE = ARCHITECTURES
else:
    major, minor = torch.cuda.get_device_capability()
    found = architecture_of(10 * major + minor)
    if found is None:
        pytest.skip("no GPU with FP4 tensor cores (sm_100, sm_103, sm_120, sm_121)", allow_module_level=True)
    HERE = (found,)


def swizzled(side: Side) -> Side:
    assert side.scales is not None
    return Side(data=side.data, scales=lay_out_ref(side.data, side.scales, Layout.SWIZZLED)[1], global_scale=side.global_scale)
