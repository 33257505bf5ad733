"""Runs the kernel tests without a GPU: their files in processes where Triton interprets instead of compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.codegen.kernels.files_that_run_kernels import PROCESSES

HERE = Path(__file__).parent


@pytest.mark.parametrize("files", PROCESSES, ids=lambda files: "+".join(files))
def test_kernels_pass_under_the_interpreter(files: tuple[str, ...]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # -P: the repository root on sys.path would hide the installed package behind its own folders.
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-rs", *(str(HERE / file) for file in files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:  # the files say what they miss in this Triton
        pytest.skip(next(line for line in done.stdout.splitlines() if line.startswith("SKIPPED")))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
