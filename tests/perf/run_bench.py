"""`fp4compile bench` where nothing is installed: `python tests/perf/run_bench.py all --out FOLDER`, all of its options."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # processes that try peers import this file again
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.perf.linked_package import link_package

    _PACKAGE = link_package()

    from fp4compile.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
