"""Gradients of a compiled step equal an eager reference of the same recipe; stochastic rounding is unbiased, fresh and reproducible."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.codegen.formats import QuantConfig
from fp4compile.weights import STORE
from tests.fp4compile.eager_recipe import Recipe, with_recipe

ONE_D, TILE = QuantConfig(), QuantConfig(block="16x16")
ROTATED = QuantConfig(hadamard=16)
# The pretraining recipe with nearest rounding everywhere, so that it is deterministic.
NEAREST = {
    "version": 1,
    "extends": "bf16",
    "default": {"precision": "w4a4", "weight": {"block": "16x16"}},
    "training": {"fprop": "w4a4", "dgrad": "w4a4", "wgrad": {"hadamard": 16}},
}
NEAREST_RECIPE = Recipe(fprop_w=TILE, dgrad_dy=ONE_D, dgrad_w=TILE, wgrad_x=ROTATED, wgrad_dy=ROTATED)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def mlp(dtype: torch.dtype) -> nn.Module:
    # Widths and the 21 tokens are no multiples of 16: padding is the operator's business in all three roles.
    return nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 56, bias=False), nn.GELU(), nn.Linear(56, 24)).to(dtype)


def gradients(model: nn.Module, run, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.float().square().mean().backward()
    return {"x": x.grad, "out": out.detach(), **{name.removeprefix("inner."): p.grad.clone() for name, p in model.named_parameters()}}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_gradients_equal_the_eager_recipe(dynamic: bool) -> None:
    model, x = mlp(torch.float32), torch.randn(3, 7, 40)
    got = gradients(model, torch.compile(model, backend="fp4", options={"policy": NEAREST, "verify": True}, dynamic=dynamic), x)
    reference = with_recipe(copy.deepcopy(model), NEAREST_RECIPE)
    want = gradients(reference, reference, x)
    high = gradients(model, model, x)
    for name, value in want.items():
        # fp32 sums in another order can move an activation across a rounding threshold, hence not bit-equal.
        assert relative(got[name], value) < 2e-3 < relative(high[name], value), name


def test_every_matmul_of_the_step_follows_its_role() -> None:
    model = mlp(torch.bfloat16)
    gradients(
        model,
        torch.compile(model, backend="fp4", options={"policy": "nvfp4_train", "strict": True}),
        torch.randn(3, 7, 40, dtype=torch.bfloat16),
    )
    rows = {(row.name, row.role): row for row in fp4compile.last_report().sites}
    for name in ("0", "2"):
        assert all(rows[name, role].precision == "nvfp4 W4A4" for role in ("fprop", "dgrad", "wgrad"))


def test_policy_controls_each_role() -> None:
    policy = {**NEAREST, "training": {"fprop": "high", "dgrad": "high", "wgrad": {"hadamard": 0}}}
    model, x = mlp(torch.float32), torch.randn(21, 40)
    got = gradients(model, torch.compile(model, backend="fp4", options={"policy": policy}), x)
    high = gradients(model, model, x)
    torch.testing.assert_close(got["out"], high["out"])
    torch.testing.assert_close(got["x"], high["x"])
    assert relative(got["2.weight"], high["2.weight"]) > 0.02
    reference = with_recipe(copy.deepcopy(model), Recipe(fprop_x=None, fprop_w=None, wgrad_x=ONE_D, wgrad_dy=ONE_D))
    assert relative(got["2.weight"], gradients(reference, reference, x)["2.weight"]) < 1e-5


def test_without_a_training_section_the_backward_is_straight_through() -> None:
    model, x = mlp(torch.float32), torch.randn(21, 40)
    got = gradients(model, torch.compile(model, backend="fp4", options={"policy": "nvfp4"}), x)
    reference = with_recipe(copy.deepcopy(model), Recipe())
    for name, value in gradients(reference, reference, x).items():
        assert relative(got[name], value) < 2e-3, name
    backward = [row for row in fp4compile.last_report().sites if row.role in ("dgrad", "wgrad")]
    assert backward and all(row.precision == "float32" and row.reason for row in backward)


@pytest.mark.parametrize("weight", ["16x16", "1x16"])
def test_a_dequantized_backward_multiplies_with_what_the_forward_multiplied_with(weight: str) -> None:
    policy = {**NEAREST, "default": {"precision": "w4a4", "weight": {"block": weight}}, "training": {"backward": "dequantized"}}
    model, x = mlp(torch.float32), torch.randn(21, 40)
    got = gradients(model, torch.compile(model, backend="fp4", options={"policy": policy, "verify": True, "strict": True}), x)
    fprop_w = QuantConfig(block=weight)
    reference = with_recipe(copy.deepcopy(model), Recipe(fprop_w=fprop_w, dgrad_w=fprop_w, dequantized=True))
    want, high = gradients(reference, reference, x), gradients(model, model, x)
    for name, value in want.items():
        assert relative(got[name], value) < 2e-3 < relative(high[name], value), name
    rows = [row for row in fp4compile.last_report().sites if row.role in ("dgrad", "wgrad")]
    assert rows and all(row.precision == "float32" and "forward multiplied with" in row.reason for row in rows)


def test_a_dequantized_backward_after_a_rotated_forward_is_refused() -> None:
    policy = {**NEAREST, "default": {"precision": "w4a4", "hadamard": 16}, "training": {"backward": "dequantized"}}
    with pytest.raises(Exception, match="rotated operand, which the backward does not multiply with"):
        torch.compile(mlp(torch.float32), backend="fp4", options={"policy": policy})(torch.randn(21, 40))


def test_random_signs_cancel_and_are_new_in_every_backward() -> None:
    policy = {**NEAREST, "training": {"fprop": "high", "dgrad": "high", "wgrad": {"hadamard": 32, "signs": "random"}}}
    model, x = mlp(torch.float32), torch.randn(3, 15, 40)  # 45 tokens: the last group of 32 is padded
    run = torch.compile(model, backend="fp4", options={"policy": policy, "verify": True, "strict": True}, dynamic=True)
    high = gradients(model, model, x)
    draws = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        draws.append(gradients(model, run, x))
        assert 0.02 < relative(draws[-1]["2.weight"], high["2.weight"]) < 0.25  # 4 bits, and no rotation left over
    first, again, *others = (d["2.weight"] for d in draws)
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)
    assert all(row.operands for row in fp4compile.last_report().sites if row.role == "wgrad")


SR = {
    **NEAREST,
    "training": {
        "fprop": "high",
        "dgrad": {"gradient": {"rounding": "stochastic"}},
        "wgrad": {"hadamard": 16, "gradient": {"rounding": "stochastic"}},
    },
}


def test_same_seed_same_gradients_and_new_draws_every_step() -> None:
    model, x = mlp(torch.float32), torch.randn(64, 40)
    run = torch.compile(model, backend="fp4", options={"policy": SR})
    steps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        steps.append([gradients(model, run, x) for _ in range(2)])
    for name in ("x", "0.weight", "2.weight"):
        assert torch.equal(steps[0][0][name], steps[1][0][name]) and torch.equal(steps[0][1][name], steps[1][1][name])
        assert not torch.equal(steps[0][0][name], steps[0][1][name])  # the next step draws anew
        assert not torch.equal(steps[0][0][name], steps[2][0][name])
        assert steps[0][0][name].abs().sum() > 0


def test_mean_over_draws_approaches_the_unrounded_gradient() -> None:
    """numerics: unbiased up to the clipping of block maxima (mean -1.1 % on them) and a truncation of 1/256 of a step."""
    model, x, draws = mlp(torch.float32), torch.randn(64, 40), 48
    policy = {**SR, "training": {"fprop": "high", "dgrad": "high", "wgrad": {"gradient": {"rounding": "stochastic"}}}}
    run = torch.compile(model, backend="fp4", options={"policy": policy})
    singles = [gradients(model, run, x)["2.weight"] for _ in range(draws)]
    reference = with_recipe(copy.deepcopy(model), Recipe(fprop_x=None, fprop_w=None, wgrad_x=ONE_D, wgrad_dy=None))
    want = product_with_quantized_x(reference, x)
    one, mean = relative(singles[0], want), relative(torch.stack(singles).mean(0), want)
    assert one > 0.05 and mean < 1.6 * one / draws**0.5 + 0.011


def product_with_quantized_x(reference: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """wgrad of the middle layer with X quantized and dY exact, which `Recipe` spells by leaving dY's config out."""
    return gradients(reference, reference, x)["2.weight"]


def test_weights_are_quantized_once_an_optimizer_step() -> None:
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run = torch.compile(model, backend="fp4", options={"policy": NEAREST})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients(model, run, x)
    copies = STORE.quantizations
    losses = []
    for _ in range(3):
        for _ in range(2):  # gradient accumulation
            loss = run(x).square().mean()
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    per_step = 3 + 2  # W of three layers for fprop; W^T of two for dgrad, as x needs no gradient
    assert STORE.quantizations - copies <= 2 * per_step + per_step
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.AdamW, 0.05), (torch.optim.SGD, 10.0)], ids=["AdamW", "SGD"])
def test_a_step_of_any_optimizer_makes_weights_be_quantized_anew(kind, lr: float, fused: bool) -> None:
    """Fused optimizers write to parameters without raising their version counters."""
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run, reference = torch.compile(model, backend="fp4", options={"policy": NEAREST}), with_recipe(copy.deepcopy(model), NEAREST_RECIPE)
    optimizers = [kind(m.parameters(), lr=lr, fused=fused) for m in (model, reference)]
    for _ in range(3):
        outputs = [call(x) for call in (run, reference)]
        assert relative(*(out.detach() for out in outputs)) < 2e-3
        for out, optimizer in zip(outputs, optimizers, strict=True):
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert relative(run(x), reference(x)) < 0.1 < relative(run(x), outputs[1])  # the graph for evaluation too


def test_checkpointed_region_draws_once() -> None:
    """Recomputation must repeat no stochastic draw: the gradient equals that of the plain model under the same seed."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model, x = mlp(torch.float32), torch.randn(64, 40)
    torch.manual_seed(3)
    plain = gradients(model, torch.compile(model, backend="fp4", options={"policy": SR}), x)
    torch._dynamo.reset()
    torch.manual_seed(3)
    wrapped = Checkpointed(model)
    again = gradients(wrapped, torch.compile(wrapped, backend="fp4", options={"policy": SR}), x)
    assert relative(again["0.weight"], plain["0.weight"]) < 1e-5


def test_autocast_quantizes_what_the_matmul_reads() -> None:
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run = torch.compile(model, backend="fp4", options={"policy": NEAREST, "strict": True})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(x)
    assert out.dtype is torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(row.precision == "nvfp4 W4A4" for row in fp4compile.last_report().sites)
