"""Kernels run on the GPU where there is one, and otherwise under Triton's interpreter, in a process of their own.

The interpreter is a switch of the whole process, read when Triton is imported; torch.compile in other tests would find it thrown. So
without a GPU `test_under_interpreter.py` starts one process a file, and the files themselves are not collected here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.codegen.kernels.files_that_run_kernels import FILES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    collect_ignore = ["test_under_interpreter.py", "test_cross_compile.py"]
    from tests.codegen.kernels.interpreter_bf16 import teach_bfloat16
    from tests.codegen.kernels.interpreter_scalars import teach_scalars
    from tests.codegen.kernels.interpreter_scaled_dot import teach_e4m3_scales

    teach_bfloat16()
    teach_scalars()
    teach_e4m3_scales()
elif torch.cuda.is_available():
    collect_ignore = ["test_under_interpreter.py"]
else:
    collect_ignore = list(FILES)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy on division by zero and NaN


@pytest.fixture(params=["maximum found on the way", "maximum first"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of quantizing: small matrices take one launch; here also the way of large ones."""
    from fp4compile.codegen.kernels import launch_quantize  # imports Triton, which not every test here wants

    if request.param == "maximum first":
        monkeypatch.setattr(launch_quantize, "_TILES_OF_A_SMALL_MATRIX", 0)
    launch_quantize.plan_of.cache_clear()
    yield request.param
    launch_quantize.plan_of.cache_clear()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
