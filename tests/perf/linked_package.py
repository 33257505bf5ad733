"""The three floors linked together as the package they become, so that a script runs where nothing is installed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def link_package() -> tempfile.TemporaryDirectory[str]:
    """Put `fp4compile` first on the path, for as long as the result lives."""
    holder = tempfile.TemporaryDirectory()
    package = Path(holder.name) / "fp4compile"
    package.mkdir()
    for source in (*(ROOT / "fp4compile").iterdir(), ROOT / "passes", ROOT / "codegen"):
        (package / source.name).symlink_to(source)
    sys.path.insert(0, holder.name)
    return holder
