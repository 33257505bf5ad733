"""Loops as people write them, over the pretraining recipe: what wraps a model or its optimizer changes no number and breaks nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.weights import STORE
from tests.fp4compile.eager_recipe import with_recipe
from tests.fp4compile.llama import Llama, loss_of
from tests.fp4compile.test_training import NEAREST, NEAREST_RECIPE, relative

SKIP = ("out",)  # a head, which the policy below leaves alone as the preset does
POLICY = {**NEAREST, "rule": [{"trait": "head", "precision": "high"}]}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model: nn.Module, policy=POLICY, **options):
    return torch.compile(model, backend="fp4", options={"policy": policy, **options})


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 48, (batch, length))


def gradients(model: nn.Module, run, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for given in batches:
        loss_of(run, given).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def reference_of(model: nn.Module) -> nn.Module:
    return with_recipe(copy.deepcopy(model), NEAREST_RECIPE, skip=SKIP)


def assert_follows(model: nn.Module, run, *batches: torch.Tensor, tolerance: float = 5e-3) -> None:
    reference = reference_of(model)
    want, high = gradients(reference, reference, *batches), gradients(model, model, *batches)
    got = gradients(model, run, *batches)
    for name, value in want.items():
        assert relative(got[name], value) < tolerance, name
    assert any(relative(high[name], value) > 10 * tolerance for name, value in want.items())


def test_a_sequence_length_that_changes_compiles_once_for_all_of_them() -> None:
    model = Llama(layers=1)
    run = compiled(model)
    for length in (20, 23, 12):  # 38, 44 and 22 tokens: no multiples of 16
        assert_follows(model, run, tokens(2, length))
    assert len(fp4compile.last_report().graphs) == 2  # a static one, then one for every length


def test_a_tied_head_stays_high_and_its_table_gets_both_gradients() -> None:
    model = Llama(layers=1, tied=True)
    run = compiled(model, {**NEAREST, "rule": [{"trait": "tied", "precision": "high"}]}, strict=True)
    assert_follows(model, run, tokens())
    rows = {(row.name, row.role): row.precision for row in fp4compile.last_report().sites}
    assert rows["out", "fprop"] == "float32" and rows["blocks.0.up_proj", "wgrad"] == "nvfp4 W4A4"


def test_the_preset_leaves_head_and_embedding_alone_and_says_what_share_it_keeps() -> None:
    model = Llama(layers=2)
    gradients(model, compiled(model, "nvfp4_train", strict=True), tokens())
    kept = {row.name for row in fp4compile.last_report().sites if row.role == "fprop" and row.precision == "float32"}
    assert kept == {"out", "blocks.1.up_proj", "blocks.1.down_proj"}  # 15% of 14 layers
    assert "among the last 15% of the layers" in str(fp4compile.last_report())
    line = next(line for line in str(fp4compile.last_report()).splitlines() if "kept" in line and "last 15%" in line)
    assert "% of operations" in line and "% of weight bytes" in line


@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_clipping_and_a_fused_optimizer_follow_the_eager_recipe(fused: bool) -> None:
    model = Llama(layers=1)
    reference, run = reference_of(model), compiled(model)
    pairs = [(m, call, torch.optim.AdamW(m.parameters(), lr=0.02, fused=fused)) for m, call in ((model, run), (reference, reference))]
    for step in range(3):
        batches = [tokens() for _ in range(2)]
        before = STORE.quantizations
        losses = []
        for m, call, optimizer in pairs:
            for given in batches:
                loss = loss_of(call, given)
                loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=5e-3)
        # 7 weights for fprop and their transposes for dgrad, once for two batches.
        assert STORE.quantizations - before == 14, step


def test_autocast_reads_float32_weights_as_bf16() -> None:
    model, given = Llama(layers=1), tokens()
    run = compiled(model, strict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(run, given)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters())
    rows = [row for row in fp4compile.last_report().sites if "proj" in row.name]
    assert len(rows) == 21 and all(row.precision == "nvfp4 W4A4" for row in rows)
    before = STORE.quantizations
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(run, given).backward()
    assert STORE.quantizations == before


def test_reduce_overhead_is_the_same() -> None:
    model, given = Llama(layers=1), tokens()
    plain = gradients(model, compiled(model), given)
    torch._dynamo.reset()
    again = gradients(model, compiled(model, mode="reduce-overhead"), given)
    assert all(relative(again[name], value) < 1e-5 for name, value in plain.items())


def test_a_resumed_run_repeats_the_losses_stochastic_rounding_included() -> None:
    def steps(model, optimizer, count: int) -> list[float]:
        run, losses = compiled(model, "nvfp4_train"), []
        for _ in range(count):
            loss = loss_of(run, tokens())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    model = Llama(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state(), fp4compile.current_step()
    want = steps(model, optimizer, 2)

    (weights, state), rng, step = saved
    torch._dynamo.reset()
    resumed = Llama(layers=1)
    resumed.load_state_dict(weights)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    optimizer.load_state_dict(state)
    torch.set_rng_state(rng)
    fp4compile.set_step(step)
    assert steps(resumed, optimizer, 2) == want
    fp4compile.set_step(0)
