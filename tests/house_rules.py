"""The house rules as functions over a source tree, so that each can be shown to catch a violation in a made-up one.

Each returns sentences, one a violation, "path:line what"; an empty list is obedience.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FLOORS = {"codegen": 0, "passes": 1, "fp4compile": 2}
MAX_LINES = 400
MAX_FUNCTION_LINES = 40
PRIVATE_TORCH = ("torch._inductor", "torch._dynamo", "torch._functorch")
MAY_IMPORT_PRIVATE_TORCH = ("fp4compile/capture.py", "fp4compile/handoff.py")
MAY_IMPORT_TRITON = ("codegen/kernels/", "codegen/emit.py")
MAY_READ_ENVIRONMENT = ("fp4compile/options.py",)
READS = ("environ", "getenv", "putenv")


@dataclass(frozen=True, kw_only=True)
class Import:
    path: str  # of the importing file, relative to the root, with forward slashes
    line: int
    module: str  # what is imported, dotted; `from a import b` counts as a.b
    typing_only: bool  # under `if TYPE_CHECKING:`


def bare_floor_modules(modules: Mapping[str, object]) -> list[str]:
    """Names in `modules` that load a floor as a package of its own, beside `fp4compile.<floor>`."""
    return sorted(name for name in modules if name.split(".")[0] in ("passes", "codegen"))


def uphill_imports(root: Path) -> list[str]:
    """codegen imports nothing above itself, passes only codegen, and no floor imports the package root or a relative path."""
    found = []
    for item in all_imports(root):
        parts = item.module.split(".")
        if parts[0] in ("passes", "codegen", ""):
            found.append(f"{item.path}:{item.line} imports {item.module}; write it from fp4compile. on")
        elif parts[0] == "fp4compile" and _floor(item.path) < _floor_of_module(parts):
            found.append(f"{item.path}:{item.line} imports {item.module}, which is a floor above it")
    return found


def private_torch_imports(root: Path) -> list[str]:
    """Compiler internals of torch, imported or reached by attribute (`torch._dynamo.reset`), live in two files."""
    found = _misplaced(root, PRIVATE_TORCH, MAY_IMPORT_PRIVATE_TORCH)
    for path in _sources(root):
        name = _relative(path, root)
        if name in MAY_IMPORT_PRIVATE_TORCH:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in PRIVATE_TORCH:
                found.append(f"{name}:{node.lineno} uses {ast.unparse(node)}; only {', '.join(MAY_IMPORT_PRIVATE_TORCH)} may")
    return found


def kernel_imports(root: Path) -> list[str]:
    """Front and middle reach kernels through operators and the registry, never directly."""
    return [
        f"{item.path}:{item.line} imports {item.module}; only codegen may"
        for item in all_imports(root)
        if item.module.startswith("fp4compile.codegen.kernels") and not item.path.startswith("codegen/")
    ]


def triton_imports(root: Path) -> list[str]:
    return _misplaced(root, ("triton",), MAY_IMPORT_TRITON)


def long_files(root: Path) -> list[str]:
    counts = {_relative(path, root): len(path.read_text().splitlines()) for path in _sources(root, ("tests", "examples"))}
    return [f"{path} has {lines} lines; {MAX_LINES} is the limit, one idea a file" for path, lines in counts.items() if lines > MAX_LINES]


def long_functions(root: Path) -> list[str]:
    """The limit is on code: neither the signature nor the docstring counts."""
    found = []
    for path in _sources(root, ("tests", "examples")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[ast.get_docstring(node) is not None :][:1]
                lines = (node.end_lineno or 0) - first[0].lineno + 1 if first else 0
                if lines > MAX_FUNCTION_LINES:
                    found.append(f"{_relative(path, root)}:{node.lineno} {node.name} has {lines} lines; {MAX_FUNCTION_LINES} is the limit")
    return found


def environment_reads(root: Path) -> list[str]:
    """`os.environ`, `os.getenv`, `os.putenv` and their `from os import` forms."""
    found = []
    for path in _sources(root):
        name = _relative(path, root)
        if name in MAY_READ_ENVIRONMENT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_attribute = isinstance(node, ast.Attribute) and node.attr in READS
            is_import = isinstance(node, ast.ImportFrom) and node.module == "os" and {alias.name for alias in node.names} & set(READS)
            if is_attribute or is_import:
                found.append(f"{name}:{node.lineno} touches the environment; only {MAY_READ_ENVIRONMENT[0]} does")
    return found


def broad_excepts(root: Path) -> list[str]:
    """`except:`, `except Exception` and `except BaseException`, alone or in a tuple."""
    found = []
    for path in _sources(root, ("tests", "examples")):
        handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
        broad = [node.lineno for node in handlers if _catches_everything(node.type)]
        found += [f"{_relative(path, root)}:{line} catches everything; name what can happen" for line in broad]
    return found


def unlisted_packages(root: Path) -> list[str]:
    """A sub-package missing from pyproject's explicit list works in an editable install and is absent from the wheel."""
    listed = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = set()
    for path in _sources(root):
        parts = Path(_relative(path, root)).parent.parts
        present.add(".".join(parts if parts[0] == "fp4compile" else ("fp4compile", *parts)))
    return [f"{name} is a folder but no package of pyproject.toml" for name in sorted(present - listed)] + [
        f"{name} is listed in pyproject.toml but has no folder" for name in sorted(listed - present)
    ]


def untested_passes(root: Path) -> list[str]:
    """Every file in passes/ that defines a `Pass` has tests/passes/test_<file>.py."""
    found = []
    for path in sorted((root / "passes").glob("*.py")):
        is_pass = any(
            isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id == "Pass" for base in node.bases)
            for node in ast.walk(ast.parse(path.read_text()))
        )
        if is_pass and not (root / "tests" / "passes" / f"test_{path.name}").exists():
            found.append(f"passes/{path.name} defines a pass; tests/passes/test_{path.name} is missing")
    return found


def all_imports(root: Path) -> Iterator[Import]:
    for path in _sources(root):
        tree = ast.parse(path.read_text())
        typing_only = {id(node) for node in _under_type_checking(tree)}
        for node in ast.walk(tree):
            for module in _modules(node):
                yield Import(path=_relative(path, root), line=node.lineno, module=module, typing_only=id(node) in typing_only)  # type: ignore[attr-defined]


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def _under_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from ast.walk(child)


def _misplaced(root: Path, modules: tuple[str, ...], allowed: tuple[str, ...]) -> list[str]:
    return [
        f"{item.path}:{item.line} imports {item.module}; only {', '.join(allowed)} may"
        for item in all_imports(root)
        if any(item.module == name or item.module.startswith(name + ".") for name in modules)
        and not item.typing_only
        and not item.path.startswith(allowed)
    ]


def _catches_everything(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException")) for name in names)


def _floor(path: str) -> int:
    return FLOORS[path.split("/")[0]]


def _floor_of_module(parts: list[str]) -> int:
    """fp4compile.codegen.x -> 0, fp4compile.passes.x -> 1, anything else of fp4compile, its root included -> 2."""
    return FLOORS[parts[1]] if len(parts) > 1 and parts[1] in ("codegen", "passes") else FLOORS["fp4compile"]


def _sources(root: Path, more: Iterable[str] = ()) -> list[Path]:
    return sorted(path for folder in (*FLOORS, *more) for path in (root / folder).rglob("*.py"))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
