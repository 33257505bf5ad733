"""What the runs differ in: the arguments of `torch.compile`, and nothing else. A row is a policy laid over the preset `nvfp4_train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NEAREST = {"gradient": {"rounding": "nearest"}}
FOUR_OVER_SIX = {"scale_rule": "four_over_six_mae"}
RANDOM_128 = {"hadamard": 128, "signs": "random"}
RANDOM_16 = {"hadamard": 16, "signs": "random"}
EDEN = {"rounding": "eden"}
EDEN_OF_FORWARD = {"rounding": "eden", "scale_rule": "amax", "source": "forward"}
WIDE = {"rounding": "stochastic", "scale_rule": "amax_17_16"}
WIDE_OF_FORWARD = {**WIDE, "source": "forward"}
OUTER = {"global_scale": "1x128"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    description: str
    policy: dict[str, Any] | None = field(default_factory=dict)  # keys over the preset; None: Inductor alone, no fp4 backend
    late: float | None = None  # share of the steps after which every forward is bf16

    def full_policy(self, steps: int) -> dict[str, Any] | None:
        """The policy of a run of `steps` optimizer steps."""
        if self.policy is None:
            return None
        schedule = {} if self.late is None else {"schedule": [{"from_step": round(self.late * steps), "fprop": "bf16"}]}
        return {"version": 1, "extends": "nvfp4_train", **self.policy, **schedule}

    def compile_arguments(self, steps: int) -> dict[str, Any]:
        """The one line that differs: `torch.compile(model, **recipe.compile_arguments(steps))`."""
        policy = self.full_policy(steps)
        return {} if policy is None else {"backend": "fp4", "options": {"policy": policy}}


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
    "late_switch": Recipe(description="forward in bf16 for the last fifth", late=0.8),
    "four_over_six": Recipe(
        description="with Four Over Six on activations and weights (arXiv 2512.02010)",
        policy={"default": {"activation": FOUR_OVER_SIX, "weight": FOUR_OVER_SIX}},
    ),
    "quartet2": Recipe(
        description="Quartet II: MS-EDEN on all operands of the backward (arXiv 2601.22813)",
        policy={
            "default": {"activation": FOUR_OVER_SIX, "weight": {"block": "1x16", **FOUR_OVER_SIX}},
            "training": {
                "dgrad": {**RANDOM_128, "gradient": EDEN, "weight": EDEN_OF_FORWARD},
                "wgrad": {**RANDOM_128, "gradient": EDEN, "activation": EDEN_OF_FORWARD},
            },
        },
    ),
    "tetrajet2": Recipe(
        description="as TetraJet-v2: outer 1x128 scales, a backward rotated and stochastic on all operands (arXiv 2510.27527)",
        policy={
            "default": {"activation": OUTER, "weight": {"block": "1x16", **OUTER}, "gradient": OUTER},
            "training": {
                "dgrad": {**RANDOM_16, "gradient": WIDE, "weight": WIDE_OF_FORWARD},
                "wgrad": {**RANDOM_16, "gradient": WIDE, "activation": WIDE_OF_FORWARD},
            },
        },
    ),
    "mxfp4_train": Recipe(
        description="MXFP4: blocks of 32, Hadamard 32 on wgrad",
        policy={"default": {"format": "mxfp4"}, "training": {"wgrad": {"hadamard": 32}}},
    ),
}
