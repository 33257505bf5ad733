"""What a user installs: one package name, every source file in it, and the data and entry points that the code relies on."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"fp4compile": "fp4compile", "passes": "fp4compile/passes", "codegen": "fp4compile/codegen"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a build folder beside the sources, and a stale one would hide a missing package."""
    source = tmp_path_factory.mktemp("source")
    for folder in FLOORS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("LICENSE*")):
        shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(source / "out"), str(source)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    (path,) = (source / "out").glob("fp4compile-*.whl")
    return zipfile.ZipFile(path)


def test_nothing_outside_the_package_enters_the_namespace(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fp4compile"}


def test_every_source_file_is_in_the_wheel(wheel):
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FLOORS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".json")
    }
    assert expected - set(wheel.namelist()) == set()


def test_entry_points(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "[torch_dynamo_backends]\nfp4 = fp4compile.backend:fp4" in text
    assert "[console_scripts]\nfp4compile = fp4compile.cli:main" in text
