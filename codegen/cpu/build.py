"""Builds the C++ kernels for this machine once; the library lies in the user's cache folder under a name that says all it depends on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fp4compile.codegen.errors import Fp4CompileError

_SOURCE_FOLDER: Final = Path(__file__).parent
_COMPILERS: Final = ("g++", "clang++", "c++")
_IS_X86: Final = platform.machine().lower() in ("x86_64", "amd64")
_TIMEOUT_SECONDS: Final = 300


class NoCompiler(Fp4CompileError, RuntimeError):
    template = "CPU kernels: none of {looked_for} is on the PATH. Install a C++17 compiler (for example the package g++)."


class BuildFailed(Fp4CompileError, RuntimeError):
    template = "CPU kernels: {compiler} failed: {detail} Install a C++17 compiler, g++ 11 or clang++ 14 or newer."


class LoadFailed(Fp4CompileError, RuntimeError):
    template = "CPU kernels: {path} was built but cannot be loaded: {detail} Delete it to build it again."


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Which instructions a build may use."""

    name: str
    flags: tuple[str, ...]


NATIVE: Final = Variant(name="native", flags=("-march=native", "-mprefer-vector-width=512") if _IS_X86 else ("-mcpu=native",))
AVX2: Final = Variant(name="avx2", flags=("-mavx2", "-mfma"))
PORTABLE: Final = Variant(name="portable", flags=())

# Without contraction each operation rounds once, as in the reference. The other two let loops with choices become vectors; neither
# changes a value.
_FLAGS: Final = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def load(variant: Variant = NATIVE) -> ctypes.CDLL:
    """The kernels' library, compiled first unless the cache holds it. Raises `NoCompiler`, `BuildFailed` or `LoadFailed`."""
    compiler = find_compiler()
    command = (compiler, *_FLAGS, *variant.flags)
    library = _cache_folder() / f"fp4-cpu-{variant.name}-{_key(command)}.so"
    if not library.exists():
        _compile(command, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise LoadFailed(path=library, detail=f"{error}.") from error


def find_compiler() -> str:
    """Path of the first C++ compiler found. Raises `NoCompiler`."""
    for name in _COMPILERS:
        if found := shutil.which(name):
            return found
    raise NoCompiler(looked_for=", ".join(_COMPILERS))


def _key(command: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (*command, _run((command[0], "--version")), cpu_flags()):
        digest.update(part.encode() + b"\0")
    for source in _sources(".cpp", ".h"):
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _sources(*suffixes: str) -> list[Path]:
    return sorted(p for p in _SOURCE_FOLDER.iterdir() if p.suffix in suffixes)


def cpu_flags() -> str:
    """What `-march=native` looks at: a cache folder may be shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(dict.fromkeys(named)) or f"{platform.machine()} {platform.processor()}"


def _compile(command: tuple[str, ...], library: Path) -> None:
    """Builds beside the final name and renames, so that processes that build at the same time never see half a file."""
    unfinished = library.with_name(f".{library.stem}-{uuid.uuid4().hex}.so")
    try:
        _run((*command, *map(str, _sources(".cpp")), "-o", str(unfinished)))
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS).stdout
    except subprocess.CalledProcessError as error:
        detail = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip() or "no message.")
        raise BuildFailed(compiler=command[0], detail=detail) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(compiler=command[0], detail=f"{error}.") from error


def _cache_folder() -> Path:
    """`~/.cache/fp4compile`, or a folder of the user's own among the temporary files where the home cannot be written."""
    for folder in (Path.home() / ".cache" / "fp4compile", Path(tempfile.gettempdir()) / f"fp4compile-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if _is_ours(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="fp4compile-"))


def _is_ours(folder: Path) -> bool:
    """Whether nobody else could have put a library there: what is found is loaded and run."""
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK)
