"""Small graphs: compile with the backend, run the same code under the eager oracle, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fp4compile
from tests.compat.fake_quant_mode import FakeQuant
from tests.compat.tracing import EVERYTHING
from tests.fp4compile.eager_recipe import Recipe


def compile_fp4(
    function: Callable[..., Any], policy: Any = EVERYTHING, *, dynamic: bool | None = None, **options: Any
) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="fp4", options={"policy": policy, "verify": True, **options}, dynamic=dynamic)


def under_oracle(function: Callable[..., Any], *args: Any, parameters: Iterable[Tensor] = ()) -> Any:
    """`function(*args)` with every product of a layer in W4A4."""
    model = function if isinstance(function, nn.Module) else parameters
    with FakeQuant(model, Recipe()):
        return function(*args)


@torch.no_grad()
def assert_same(function: Callable[..., Any], *args: Any, parameters: Iterable[Tensor] = (), dynamic: bool | None = None) -> Tensor:
    """Compiled and oracle agree to float32's own accuracy, and both are away from the unquantized result. Returns the compiled output."""
    got, want, high = compile_fp4(function, dynamic=dynamic)(*args), under_oracle(function, *args, parameters=parameters), function(*args)
    assert relative(got, want) < 1e-5
    assert relative(high, want) > 1e-2
    return got


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a.double() - b.double()).norm() / b.double().norm())


def rows() -> list[Mapping[str, Any]]:
    """(name, role, precision) of what was compiled last."""
    return [(row.name, row.role, row.precision) for row in fp4compile.last_report().sites]


def precisions() -> list[str]:
    return [row.precision for row in fp4compile.last_report().sites]
