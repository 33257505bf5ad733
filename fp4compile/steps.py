"""Which optimizer step the run is at: what the schedule of a policy goes by.

Steps of every `torch.optim.Optimizer` are counted from the import of this module on, those of the busiest one. A loop with an optimizer of
its own, and one that resumes, says where it is: `fp4compile.set_step(n)`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.weights import STORE


class NotAStep(Fp4CompileError, ValueError):
    template = "set_step: found {found!r}; a whole number from 0 on is needed, the number of optimizer steps already done."


@dataclass(kw_only=True)
class Clock:
    """Counts steps. `start` is what the user said last; `done` counts since then, `most` keeps the largest count of an optimizer."""

    start: int = 0
    most: int = 0
    done: weakref.WeakKeyDictionary[Optimizer, int] = field(default_factory=weakref.WeakKeyDictionary)

    @property
    def step(self) -> int:
        return self.start + self.most

    def set(self, step: int) -> None:
        self.start, self.most = step, 0
        self.done.clear()

    def tick(self, optimizer: Optimizer) -> None:
        self.done[optimizer] = self.done.get(optimizer, 0) + 1
        self.most = max(self.most, self.done[optimizer])


CLOCK = Clock()


def set_step(step: int) -> None:
    """Say that `step` optimizer steps are done, as after loading a checkpoint; optimizers are counted on from there.

    The next call of a compiled model follows the schedule of its policy at this step. Raises `NotAStep`.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise NotAStep(found=step)
    CLOCK.set(step)
    STORE.forget_all()  # a checkpoint may have been loaded in a way that no version counter shows, as into shards


def current_step() -> int:
    """Optimizer steps done: those counted, from the last `set_step` on."""
    return CLOCK.step


@torch.compiler.disable
def _after_optimizer_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    CLOCK.tick(optimizer)


register_optimizer_step_post_hook(_after_optimizer_step)  # type: ignore[arg-type]
