"""On a GPU: the same policy gives what it gives on the CPU, in every mode, for inference and training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.codegen.formats import QuantConfig
from fp4compile.weights import STORE
from tests.fp4compile.eager_recipe import Recipe, with_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def mlp(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 200, bias=False), nn.GELU(), nn.Linear(200, 24)).to("cuda", dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("policy", "recipe"), [
    ("nvfp4", Recipe()),
    ("nvfp4_a16", Recipe(fprop_x=None)),
    ("mxfp4", Recipe(fprop_x=QuantConfig(format="mxfp4"), fprop_w=QuantConfig(format="mxfp4"))),
])  # fmt: skip
def test_inference_equals_the_eager_recipe(policy: str, recipe: Recipe, mode: str) -> None:
    model = mlp(torch.float32)
    run = torch.compile(model, backend="fp4", options={"policy": policy, "mode": mode, "strict": True})
    before = STORE.quantizations
    for _ in range(4):  # CUDA graphs warm up, record, replay
        x = torch.randn(3, 7, 40, device="cuda")
        want = with_recipe(copy.deepcopy(model), recipe)(x)
        assert relative(run(x).clone(), want) < 2e-3
    assert STORE.quantizations - before == 3
    assert not fp4compile.last_report().fallbacks and all(row.kernel for row in fp4compile.last_report().sites)


@torch.no_grad()
def test_a_changed_weight_reaches_a_recorded_cuda_graph() -> None:
    model, x = mlp(BF16), torch.randn(5, 40, device="cuda", dtype=BF16)
    run = torch.compile(model, backend="fp4", mode="reduce-overhead")
    for _ in range(4):
        first = run(x).clone()
    model[2].weight.mul_(-1)
    model[4].bias.zero_()
    second = run(x).clone()
    torch._dynamo.reset()
    assert torch.equal(second, torch.compile(model, backend="fp4")(x)) and not torch.equal(first, second)


NEAREST = {
    "version": 1,
    "extends": "bf16",
    "default": {"precision": "w4a4", "weight": {"block": "16x16"}},
    "training": {"fprop": "w4a4", "dgrad": "w4a4", "wgrad": {"hadamard": 16}},
}
RECIPE = Recipe(
    fprop_w=QuantConfig(block="16x16"), dgrad_dy=QuantConfig(), dgrad_w=QuantConfig(block="16x16"),
    wgrad_x=QuantConfig(hadamard=16), wgrad_dy=QuantConfig(hadamard=16),
)  # fmt: skip


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_step_equals_the_eager_recipe(mode: str) -> None:
    model, x = mlp(torch.float32), torch.randn(3, 7, 40, device="cuda")
    run = torch.compile(model, backend="fp4", options={"policy": NEAREST, "mode": mode})
    for _ in range(3):
        model.zero_grad()
        run(x).square().mean().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    reference = with_recipe(copy.deepcopy(model), RECIPE)
    reference.zero_grad()
    reference(x).square().mean().backward()
    for name, p in reference.named_parameters():
        assert relative(got[name], p.grad) < 3e-3, name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_pretraining_recipe_draws_anew_and_learns(mode: str) -> None:
    model, x = mlp(torch.float32), torch.randn(64, 40, device="cuda")
    run = torch.compile(model, backend="fp4", options={"policy": "nvfp4_train", "mode": mode})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    grads, losses = [], []
    for _ in range(3):
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append(model[2].weight.grad.clone())
    assert not torch.equal(grads[1], grads[2]) and grads[2].abs().sum() > 0
    for _ in range(20):
        loss = run(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_free_weights_on_the_gpu() -> None:
    model, x = mlp(BF16), torch.randn(5, 40, device="cuda", dtype=BF16)
    run = torch.compile(model, backend="fp4", options={"policy": "nvfp4", "free_weights": True})
    first = run(x)
    assert torch.equal(run(x), first) and sum(g.freed_bytes for g in fp4compile.last_report().graphs) > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_weight_only_products_read_tiled_weights_that_can_be_restored(dtype: torch.dtype) -> None:
    """On Hopper and before it the store lays the weights out for the decode kernels; every number of rows multiplies the same codes."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 272, bias=False), nn.ReLU(), nn.Linear(272, 40)).to("cuda", dtype)
    reference = with_recipe(copy.deepcopy(model), Recipe(fprop_x=None))
    run = torch.compile(model, backend="fp4", options={"policy": "nvfp4_a16", "free_weights": True, "strict": True})
    for rows in (1, 2, 7, 24, 100, 300, 2100):
        x = torch.randn(rows, 256, device="cuda", dtype=dtype)
        assert relative(run(x), reference(x)) < 8e-3, rows  # a few roundings to bf16
    if torch.cuda.get_device_capability()[0] < 10:
        assert {row.kernel for row in fp4compile.last_report().sites} == {"triton weight-only"}
    assert fp4compile.restore(model) == 3
    for rows in (1, 100):
        x = torch.randn(rows, 256, device="cuda", dtype=dtype)
        assert relative(run(x), model(x)) < 8e-3, rows


@torch.no_grad()
def test_llama_and_grouped_experts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    ids = torch.randint(0, 128, (2, 24), device="cuda")
    for kind, extra in (("Llama", {}), ("Mixtral", {"num_local_experts": 4})):
        config = getattr(transformers, f"{kind}Config")(**sizes, **extra)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to("cuda", BF16).eval()
        want = model(ids).logits
        got = torch.compile(model, backend="fp4", options={"policy": "nvfp4"})(ids).logits
        assert 1e-3 < relative(got, want) < 0.5, kind
        assert not fp4compile.last_report().fallbacks
        torch._dynamo.reset()
