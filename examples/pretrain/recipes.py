"""What the runs differ in: the arguments of `torch.compile`, and nothing else. A row is a policy laid over the preset `nvfp4_train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NEAREST = {"gradient": {"rounding": "nearest"}}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    description: str
    policy: dict[str, Any] | None = field(default_factory=dict)  # keys over the preset; None: Inductor alone, no fp4 backend

    @property
    def full_policy(self) -> dict[str, Any] | None:
        return None if self.policy is None else {"version": 1, "extends": "nvfp4_train", **self.policy}

    def compile_arguments(self) -> dict[str, Any]:
        """The one line that differs: `torch.compile(model, **recipe.compile_arguments())`."""
        return {} if self.policy is None else {"backend": "fp4", "options": {"policy": self.full_policy}}


RECIPES = {
    "bf16": Recipe(description="bf16, torch.compile", policy=None),
    "nvfp4_train": Recipe(description="NVFP4, the recipe of arXiv 2509.25149"),
    "without_sr": Recipe(description="without stochastic rounding", policy={"training": {"dgrad": NEAREST, "wgrad": NEAREST}}),
    "without_rht": Recipe(description="without the Hadamard transform", policy={"training": {"wgrad": {"hadamard": 0}}}),
    "without_2d": Recipe(description="without 2D weight scales (1x16)", policy={"default": {"weight": {"block": "1x16"}}}),
    "without_high": Recipe(
        description="without high-precision layers",
        policy={"rule": [{"match": "layers.**", "precision": "w4a4"}]},
    ),
}
