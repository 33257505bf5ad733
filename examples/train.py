"""Train a small model in NVFP4 with a plain PyTorch loop: one line differs from bf16.

python examples/train.py --steps 60
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

import fp4compile


def task(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A regression that a two-layer network can learn: a fixed random nonlinear map."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 64, generator=generator)
    teacher = torch.randn(64, 64, generator=generator) / 8
    return x.to(device), torch.tanh(x @ teacher).to(device)


def losses(policy: str, steps: int, device: str) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64)).to(device)
    step = torch.compile(model, backend="fp4", options={"policy": policy})  # the one line
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, y = task(256, device)
    history: list[float] = []
    for _ in tqdm(range(steps), desc=policy):
        loss = nn.functional.mse_loss(step(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the mean loss of the last ten steps for each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    final: dict[str, float] = {}
    for policy in ("bf16", "nvfp4_train"):
        history = losses(policy, args.steps, args.device)
        final[policy] = sum(history[-10:]) / 10
        print(f"{policy:<12} first loss {history[0]:.4f}, last ten {final[policy]:.4f}")
    print(fp4compile.last_report())
    return final


if __name__ == "__main__":
    main()
