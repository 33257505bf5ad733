"""Compile a model with the fp4 backend, compare it with bf16, and read what happened.

python examples/quickstart.py --dump out/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import fp4compile


class Block(nn.Module):
    """A gated MLP with a residual connection, as in Llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


def main(argv: Sequence[str] | None = None) -> float:
    """Returns the relative difference of the 4-bit model to the bf16 one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="nvfp4", help="preset or TOML file")
    parser.add_argument("--dump", help="folder for the transformed graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(256, 688) for _ in range(2))).to(args.device, torch.bfloat16).eval()
    x = torch.randn(4, 32, 256, device=args.device, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="fp4", options={"policy": args.policy, "dump": args.dump})
    with torch.no_grad():
        expected, got = model(x), compiled(x)
    print(fp4compile.last_report())
    difference = float((got - expected).float().norm() / expected.float().norm())
    print(f"\nrelative difference to bf16: {difference:.3f}")
    return difference


if __name__ == "__main__":
    main()
