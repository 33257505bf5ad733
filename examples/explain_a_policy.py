"""Ask what a policy file would do with a model, before anything is compiled.

python examples/explain_a_policy.py examples/policy.toml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import fp4compile


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """What `fp4compile explain examples/explain_a_policy.py` calls: a module and its inputs."""
    return nn.Sequential(*(Block(64, 160) for _ in range(3))).to(torch.bfloat16), (torch.randn(8, 64, dtype=torch.bfloat16),)


def main(argv: Sequence[str] | None = None) -> fp4compile.Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", nargs="?", default=str(Path(__file__).with_name("policy.toml")))
    args = parser.parse_args(argv)
    module, inputs = model()
    with torch.no_grad():
        report = fp4compile.explain(module, *inputs, policy=args.policy)
    print(report.to_table(folded=False))
    return report


if __name__ == "__main__":
    main()
