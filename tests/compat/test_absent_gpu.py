"""Training steps compiled for GPUs without one: recipes through Inductor's code generation for CUDA and through our launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("absent_gpu.py")
POLICIES = Path(__file__).parents[2] / "examples" / "policies"
# (policy, compute capability): kernels that must be among those launched
STEPS = {
    ("nvfp4_train", 90): {"quantize_kernel", "quantize_both_kernel", "tile_weight_kernel", "wide_decode_mm_kernel"},
    (f"{POLICIES}/quartet2.toml", 90): {"amax_kernel", "quantize_kernel", "dequantize_plain_kernel", "wide_decode_mm_kernel"},
    (f"{POLICIES}/tetrajet2.toml", 90): {"quantize_here_kernel", "runs_mm_kernel"},
    ("nvfp4_train", 100): {"quantize_kernel", "quantize_both_kernel", "native_mm_kernel"},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/e2e runs what is only compiled here")
@pytest.mark.parametrize(("policy", "capability"), STEPS, ids=lambda value: Path(str(value)).stem)
def test_a_training_step_compiles_for_a_gpu_that_is_absent(policy: str, capability: int, tmp_path: Path) -> None:
    # Inductor would otherwise keep, under the name of CUDA, what was traced on a CPU.
    environment = {
        **os.environ,
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", str(PROGRAM), policy, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["inductor"]) > 10, "kernels of forward and backward"
    for call in found["calls"]:
        assert call["result"] == call["expected"], call["operator"]
    assert STEPS[policy, capability] <= {kernel for call in found["calls"] for kernel in call["kernels"]}
    assert not any("reference" in kernel or "cpu" in kernel for kernel in found["kernels"])
