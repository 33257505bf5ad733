"""The tree obeys the house rules, and each rule catches a violation seeded into a tiny made-up tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import house_rules

ROOT = Path(__file__).parents[1]
RULES = {
    rule.__name__: rule
    for rule in (
        house_rules.uphill_imports,
        house_rules.kernel_imports,
        house_rules.private_torch_imports,
        house_rules.triton_imports,
        house_rules.long_files,
        house_rules.long_functions,
        house_rules.environment_reads,
        house_rules.broad_excepts,
        house_rules.unlisted_packages,
        house_rules.untested_passes,
    )
}
PYPROJECT = '[tool.setuptools]\npackages = ["fp4compile", "fp4compile.passes", "fp4compile.codegen"]\n'
# What an obedient tree holds; a case below replaces or adds one file.
OBEDIENT = {
    "pyproject.toml": PYPROJECT,
    "fp4compile/__init__.py": "",
    "fp4compile/capture.py": "import torch._dynamo\nfrom fp4compile.passes.base import Pass\n",
    "fp4compile/options.py": "import os\nDEBUG = os.environ.get('X')\n",
    "passes/__init__.py": "",
    "passes/base.py": "from abc import ABC\nfrom fp4compile.codegen.ops import x\nclass Pass(ABC): ...\n",
    "passes/fold.py": "class Fold(Pass): ...\ndef f(\n    x,\n):\n    '''a\n    b'''\n" + "    x = 1\n" * 40,
    "tests/passes/test_fold.py": "",
    "codegen/__init__.py": "",
    "codegen/ops.py": "try:\n    x = 1\nexcept (ValueError, KeyError):\n    raise\n",
    "codegen/emit.py": "import triton\n",
    "codegen/kernels.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton\n",
}
SEEDED = [
    ("uphill_imports", "codegen/ops.py", "from fp4compile.passes.base import Pass\n", "codegen/ops.py:1 imports fp4compile.passes"),
    ("uphill_imports", "codegen/ops.py", "def f():\n    import fp4compile.backend\n", "codegen/ops.py:2 imports fp4compile.backend"),
    ("uphill_imports", "passes/base.py", "from fp4compile import options\n", "passes/base.py:1 imports fp4compile.options"),
    ("uphill_imports", "passes/base.py", "import codegen.ops\n", "imports codegen.ops; write"),
    ("uphill_imports", "passes/base.py", "from . import fold\n", "passes/base.py:1"),
    ("kernel_imports", "fp4compile/capture.py", "from fp4compile.codegen.kernels import quantize\n", "only codegen may"),
    ("private_torch_imports", "fp4compile/options.py", "from torch import _inductor\n", "options.py:1 imports torch._inductor"),
    ("private_torch_imports", "passes/fold.py", "import torch._functorch.config\n", "imports torch._functorch.config"),
    ("private_torch_imports", "passes/fold.py", "import torch\ntorch._dynamo.reset()\n", "fold.py:2 uses torch._dynamo"),
    ("triton_imports", "codegen/ops.py", "import triton.language as tl\n", "codegen/ops.py:1 imports triton.language"),
    ("long_files", "passes/fold.py", "x = 1\n" * 401, "passes/fold.py has 401 lines"),
    (
        "long_functions",
        "passes/fold.py",
        "def f(\n    x,\n):\n    '''a\n    b'''\n" + "    x = 1\n" * 41,
        "passes/fold.py:1 f has 41 lines",
    ),
    ("environment_reads", "codegen/ops.py", "import os\nx = os.environ['A']\n", "codegen/ops.py:2"),
    ("environment_reads", "codegen/ops.py", "from os import getenv\n", "codegen/ops.py:1"),
    ("broad_excepts", "codegen/ops.py", "try:\n    x = 1\nexcept Exception:\n    pass\n", "codegen/ops.py:3"),
    ("broad_excepts", "codegen/ops.py", "try:\n    x = 1\nexcept (KeyError, BaseException):\n    pass\n", "codegen/ops.py:3"),
    ("broad_excepts", "tests/passes/test_fold.py", "try:\n    x = 1\nexcept:\n    pass\n", "tests/passes/test_fold.py:3"),
    ("unlisted_packages", "codegen/new/__init__.py", "", "fp4compile.codegen.new is a folder but no package"),
    ("unlisted_packages", "pyproject.toml", PYPROJECT.replace(", ", ', "fp4compile.gone", ', 1), "fp4compile.gone is listed"),
    ("untested_passes", "passes/rotate.py", "class Rotate(Pass): ...\n", "tests/passes/test_rotate.py is missing"),
]


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_obeys(rule):
    assert RULES[rule](ROOT) == []


@pytest.mark.parametrize("rule", RULES)
def test_an_obedient_tree_is_not_accused(rule, tmp_path):
    assert RULES[rule](write_tree(tmp_path, OBEDIENT)) == []


@pytest.mark.parametrize(("rule", "path", "text", "said"), SEEDED, ids=[f"{r}-{p}" for r, p, *_ in SEEDED])
def test_a_seeded_violation_is_caught(rule, path, text, said, tmp_path):
    found = RULES[rule](write_tree(tmp_path, OBEDIENT | {path: text}))
    assert len(found) == 1
    assert said in found[0]


def test_every_rule_has_a_seeded_violation():
    assert {rule for rule, *_ in SEEDED} == set(RULES)


def test_bare_modules_are_named():
    modules = {"passes": 0, "codegen.ops": 0, "fp4compile.passes": 0, "codegenerator": 0}
    assert house_rules.bare_floor_modules(modules) == ["codegen.ops", "passes"]


@pytest.mark.parametrize("module", ["fp4compile", "fp4compile.codegen", "fp4compile.passes"])
def test_import_is_light(module):
    """Neither Triton nor Inductor is loaded by an import: a user who only reads a policy pays for neither."""
    heavy = "triton", "torch._inductor", "transformers", "gguf"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
