"""Kernels run on the GPU where there is one, and otherwise under Triton's interpreter, in a process of their own.

The interpreter is a switch of the whole process, read when Triton is imported; torch.compile in other tests would find it thrown. So
without a GPU `test_under_interpreter.py` starts one process a file, and the files themselves are not collected here.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUN_KERNELS = [
    "test_quantize_exact.py",
    "test_quantize_residual_exact.py",
    "test_scaled_mm.py",
    "test_grouped.py",
    "test_flagged_mm.py",
    "test_weight_products.py",
    "test_native_mm.py",
    "test_native_grouped.py",
]

if INTERPRETED:
    collect_ignore = ["test_under_interpreter.py", "test_cross_compile.py"]
    from tests.codegen.kernels.interpreter_bf16 import teach_bfloat16
    from tests.codegen.kernels.interpreter_scaled_dot import teach_e4m3_scales

    teach_bfloat16()
    teach_e4m3_scales()
elif torch.cuda.is_available():
    collect_ignore = ["test_under_interpreter.py"]
else:
    collect_ignore = RUN_KERNELS


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy on division by zero and NaN


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
