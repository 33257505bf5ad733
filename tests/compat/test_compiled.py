"""The same comparison with kernels and Inductor in place, for a handful of families; and one Llama product by product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fp4compile
from fp4compile.codegen import ops
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.handoff import rounding_like_eager
from fp4compile.weights import STORE
from tests.compat.fake_quant_mode import FakeQuant
from tests.compat.families import BY_NAME
from tests.compat.test_families import SEEDS, Case, agrees, check_every_product_is_a_row
from tests.compat.tracing import EVERYTHING, Traced
from tests.fp4compile.eager_recipe import Recipe
from tests.fp4compile.test_training import NEAREST, NEAREST_RECIPE

# Inductor keeps values of fused bf16 operators in float32; with this it rounds where eager mode does, and the comparison is exact again.
LIKE_EAGER = rounding_like_eager(torch.device("cpu"))


def compiled(case: Case, policy: Any = EVERYTHING, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    options = {"policy": policy, "verify": True, "inductor": LIKE_EAGER, **options}
    return torch.compile(case.model, backend="fp4", options=options, dynamic=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "mixtral"])
def test_inference(name: str) -> None:
    family = BY_NAME[name]
    for seed in SEEDS:
        case = Case.draw(family, seed)
        before = STORE.quantizations
        run, oracle = compiled(case, strict=True), FakeQuant(case.model, Recipe())
        high, got, again = case.output(case.model), case.output(run), case.output(run)
        with oracle:
            want = case.output(case.model)
        rows = fp4compile.last_report().sites
        check_every_product_is_a_row(family, list(rows), oracle)
        assert torch.equal(got["output"], again["output"])
        assert STORE.quantizations - before == sum(row.role == "fprop" for row in rows)  # no weight twice
        if agrees(got, want, high, family.dtype):
            return
    pytest.fail("no draw equals the eager run")


def test_training() -> None:
    family = BY_NAME["llama"]
    for seed in SEEDS:
        case = Case.draw(family, seed)
        run = compiled(case, NEAREST)
        high, got = case.gradients(case.model), case.gradients(run)
        with FakeQuant(case.model, NEAREST_RECIPE):
            want = case.gradients(case.model)
        if agrees(got, want, high, family.dtype):
            return
    pytest.fail("no draw equals the eager run")


def test_stochastic_training_stays_near_the_unquantized_gradient() -> None:
    case = Case.draw(BY_NAME["llama"], 0)
    got, high = case.gradients(compiled(case, "nvfp4_train")), case.gradients(case.model)
    assert all(g.isfinite().all() and g.any() for g in got.values())
    cosine = torch.nn.functional.cosine_similarity(*(torch.cat([g.flatten() for g in values.values()]) for values in (got, high)), dim=0)
    assert cosine > 0.9


class Watched(fx.Interpreter):
    """Runs a graph and keeps what `fp4::` operators were given and returned."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: list[tuple[Any, tuple[Any, ...], Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in (ops.QUANTIZE, ops.SCALED_MM):
            self.seen.append((n.target, self.fetch_args_kwargs_from_env(n)[0], result))
        return result


@torch.no_grad()
def test_each_product_of_a_llama_is_exact_to_one_rounding() -> None:
    case = Case.draw(BY_NAME["llama"], 0)
    model = case.model.to(torch.bfloat16)
    seen: list[tuple[Any, tuple[Any, ...], Any]] = []

    class WatchedTraced(Traced):
        def execute(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            watched = Watched(gm)
            result = watched.run(*inputs)
            seen.extend(watched.seen)
            return result

    WatchedTraced(model)(**case.inputs)
    products = [entry for entry in seen if entry[0] is ops.SCALED_MM]
    assert len(products) == 15  # seven a layer, and the head
    for target, args, result in seen:
        if target is ops.QUANTIZE:
            assert_same_codes(args, result)
        else:
            assert_one_rounding(args, result)


def assert_same_codes(args: tuple[Any, ...], result: tuple[Tensor, ...]) -> None:
    for got, want in zip(result, quantize_ref(args[0], ops.config_of(*args[2:-1]), axis=args[1]), strict=True):
        assert torch.equal(
            got.view(torch.uint8) if got.dtype.itemsize == 1 else got, want.view(torch.uint8) if want.dtype.itemsize == 1 else want
        )


def assert_one_rounding(args: tuple[Any, ...], result: Tensor) -> None:
    """Half a unit in the last place of bf16, 2^-8 of the value, and what float32 sums of K products may lose."""
    left, right = (dequantize_ref(*args[i : i + 3]).double() for i in (0, 3))
    exact = left @ right.mT + (0 if args[6] is None else args[6].double())
    sums = left.abs() @ right.mT.abs() * left.shape[-1] * 2**-24
    assert ((result.double() - exact).abs() <= exact.abs() * 2**-8 + sums).all()
