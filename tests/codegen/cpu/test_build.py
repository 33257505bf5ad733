"""Building the kernels: cached, safe for processes that race, and told apart by all that matters."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp4compile.codegen.cpu import build, launch
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    launch._native.cache_clear()
    yield
    launch._native.cache_clear()


@pytest.fixture
def small_source(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "_SOURCE_FOLDER", folder)
    return folder


@needs_compiler
def test_the_second_load_compiles_nothing(empty_home: Path, small_source: Path, monkeypatch: pytest.MonkeyPatch):
    assert build.load(build.PORTABLE).answer() == 42
    files = list((empty_home / ".cache" / "fp4compile").iterdir())
    assert len(files) == 1 and files[0].name.startswith("fp4-cpu-portable-")
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    build.load(build.PORTABLE)


@needs_compiler
def test_the_key_knows_flags_and_sources(small_source: Path):
    compiler = build.find_compiler()
    keys = {build._key((compiler, "-O3")), build._key((compiler, "-O2")), build._key((compiler, "-O3", "-mavx2"))}
    assert len(keys) == 3 and build._key((compiler, "-O3")) in keys
    with (small_source / "small.cpp").open("a") as file:
        file.write("// changed\n")
    keys.add(build._key((compiler, "-O3")))
    (small_source / "new.h").touch()
    keys.add(build._key((compiler, "-O3")))
    assert len(keys) == 5


@needs_compiler
def test_processes_that_race_all_end_with_the_same_whole_library(empty_home: Path, small_source: Path):
    program = (
        "from pathlib import Path; from fp4compile.codegen.cpu import build;"
        f"build._SOURCE_FOLDER = Path({str(small_source)!r}); print(build.load(build.PORTABLE).answer())"
    )
    racers = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [racer.communicate(timeout=240)[0].strip() for racer in racers] == ["42"] * 3
    assert [p.suffix for p in (empty_home / ".cache" / "fp4compile").iterdir()] == [".so"]


@needs_compiler
def test_a_broken_source_names_the_compilers_first_error(empty_home: Path, small_source: Path):
    (small_source / "bad.cpp").write_text("int f() { return undeclared_thing; }\n")
    with pytest.raises(build.BuildFailed, match="undeclared_thing"):
        build.load(build.PORTABLE)
    assert list((empty_home / ".cache" / "fp4compile").iterdir()) == []


@needs_compiler
def test_a_damaged_library_says_which_file_to_delete(empty_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "_compile", lambda command, library: library.write_bytes(b"not a library"))
    with pytest.raises(build.LoadFailed, match=r"fp4-cpu-portable-.*Delete it"):
        build.load(build.PORTABLE)


def test_a_folder_others_may_write_is_not_used(empty_home: Path):
    folder = empty_home / ".cache" / "fp4compile"
    folder.mkdir(parents=True)
    assert build._cache_folder() == folder
    folder.chmod(0o777)
    assert build._cache_folder() != folder


def test_without_a_compiler_the_reference_runs_and_says_so_once(no_compiler: None, caplog: pytest.LogCaptureFixture):
    x, w = torch.randn(3, 40), torch.randn(5, 40)
    caplog.set_level(logging.WARNING, logger="fp4compile.codegen.cpu")
    config = QuantConfig(hadamard=16)
    ours, expected = launch.quantize(x, config), quantize_ref(x, config)
    assert torch.equal(ours[0], expected[0])
    b = quantize_ref(w, QuantConfig())
    out = launch.scaled_mm(x, None, None, *b, None, 40, torch.float32)
    assert torch.equal(out, scaled_mm_ref(x, None, None, *b, None, 40, torch.float32))
    reason = launch.available()
    assert reason is not None and "g++" in reason and "Install a C++17 compiler" in reason
    assert [r.levelname for r in caplog.records if r.name == "fp4compile.codegen.cpu"] == ["WARNING"]
    assert "slow reference" in caplog.text


@needs_compiler
def test_with_a_compiler_the_kernels_are_available_on_torchs_threads():
    assert launch.available() is None
    assert ctypes.cast(launch._parallel_for(), ctypes.c_void_p).value, "torch_parallel_for is part of torch's stable C interface since 2.10"


@needs_compiler
def test_importing_the_operators_builds_nothing(empty_home: Path):
    program = "import fp4compile.codegen.ops, fp4compile.codegen.cpu.launch"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not (empty_home / ".cache").exists()
