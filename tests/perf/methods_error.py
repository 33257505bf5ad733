"""Quantization error of every weight method on synthetic data beside the published-style anchors that its test holds it to.

    python tests/perf/methods_error.py [--seeds 5]

Prints 100 sum(err^2) / sum(x^2) over 2^20 values, the mean of the seeds, and how far that is from the anchor.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import sys
from statistics import mean

from linked_package import ROOT, link_package
from tabulate import tabulate

LINK = link_package()
sys.path.append(str(ROOT))

from fp4compile.codegen.formats import QuantConfig  # noqa: E402
from tests.codegen.reference.test_method_errors import ANCHORS, CONFIGS, OWN_CONFIGS, SWEEP_448, at_448, draw, relative_error  # noqa: E402

MORE = (*OWN_CONFIGS, QuantConfig(scale_rule="sweep", block="16x16"))


def cells(name: str, seeds: int) -> tuple[list[str], list[str]]:
    """Of one distribution: each rule of the anchors with its distance from them, and each that has none."""
    samples = [draw(name, seed) for seed in range(seeds)]

    def error(config: QuantConfig, rule: str = "") -> float:
        return mean(relative_error(x, at_448(x) if rule == SWEEP_448 else config) for x in samples)

    found = [error(config, rule) for rule, config in CONFIGS.items()]
    anchored = [f"{value:.3f} ({value / anchor - 1:+.1%})" for value, anchor in zip(found, ANCHORS[name], strict=True)]
    return anchored, [f"{error(config):.3f}" for config in MORE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    rows = {name: cells(name, args.seeds) for name in ANCHORS}
    print(tabulate([[name, *anchored] for name, (anchored, _) in rows.items()], headers=["", *CONFIGS], tablefmt="github"))
    headers = ["", *(config.describe() for config in MORE)]
    print("\n" + tabulate([[name, *more] for name, (_, more) in rows.items()], headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
