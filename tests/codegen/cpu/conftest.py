"""Each CPU kernel test runs on every build this machine can make: its own, one without 512-bit vectors, one without intrinsics."""

from __future__ import annotations

import shutil

import pytest

from fp4compile.codegen.cpu import build, launch


@pytest.fixture(scope="session", params=[build.NATIVE, build.AVX2, build.PORTABLE], ids=lambda v: v.name)
def kernels(request: pytest.FixtureRequest) -> launch.Kernels:
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    if request.param is build.AVX2 and "avx2" not in build.cpu_flags():
        pytest.skip("needs a CPU with AVX2")
    return launch.load(request.param)
