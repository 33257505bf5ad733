"""Win back what NVFP4 costs a trained model: a quantized student learns the outputs of the model it was made of (arXiv 2601.20088).

python examples/distill.py --steps 100
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from tqdm import tqdm

import fp4compile

POLICY = Path(__file__).parent / "policies" / "distill.toml"
WIDTH, CLASSES, BATCH = 64, 16, 512


class Classifier(nn.Module):
    """Two residual layers between an embedding of the input and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.second = nn.Linear(WIDTH, 128), nn.Linear(128, 128), nn.Linear(128, 128)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        x = x + self.first(x).relu()
        return self.head(x + self.second(x).relu())


def inputs(seed: int, device: str) -> Tensor:
    """Heavy-tailed, as activations are: the largest values of a block decide how finely the others are rounded."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, WIDTH, generator=generator) * torch.randn(BATCH, WIDTH, generator=generator).exp()).to(device)


def labels(x: Tensor) -> Tensor:
    """A rule that the teacher can learn."""
    directions = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(1)).to(x.device)
    return (torch.tanh(x) @ directions).argmax(-1)


def trained_teacher(device: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        x = inputs(step, device)
        cross_entropy(model(x), labels(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the student's distribution from the teacher's, a sample."""
    return kl_div(log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="batchmean")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the KL from the teacher on unseen inputs, of the model as quantized and of the same after distillation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate; large models want 1e-6 to 1e-5")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch._dynamo.reset()
    teacher = trained_teacher(args.device)
    weights = copy.deepcopy(teacher).requires_grad_(True)
    student = torch.compile(weights, backend="fp4", options={"policy": str(POLICY)})
    unseen = inputs(10_000, args.device)
    found = {"quantized": divergence(student(unseen), teacher(unseen)).item()}
    optimizer = torch.optim.AdamW(weights.parameters(), lr=args.rate, weight_decay=0.0)
    for step in tqdm(range(args.steps), desc="distill"):
        for group in optimizer.param_groups:
            group["lr"] = args.rate * (1 - step / args.steps)
        x = inputs(1_000 + step, args.device)
        divergence(student(x), teacher(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found["distilled"] = divergence(student(unseen), teacher(unseen)).item()
    print(fp4compile.last_report())
    print(f"KL from the teacher: {found['quantized']:.4f} as quantized, {found['distilled']:.4f} after {args.steps} steps")
    return found


if __name__ == "__main__":
    main()
