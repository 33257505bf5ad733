"""A schedule switches at its step: one compilation more, nothing stale, and a loop that knows nothing of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.steps import CLOCK
from fp4compile.weights import STORE
from tests.fp4compile.eager_recipe import Recipe, with_recipe
from tests.fp4compile.test_training import NEAREST, NEAREST_RECIPE, gradients, mlp, relative

FORWARD_LATE = {**NEAREST, "schedule": [{"from_step": 2, "fprop": "bf16"}]}
BACKWARD_ONLY = Recipe(
    fprop_x=None, fprop_w=None, dgrad_dy=NEAREST_RECIPE.dgrad_dy, dgrad_w=NEAREST_RECIPE.dgrad_w,
    wgrad_x=NEAREST_RECIPE.wgrad_x, wgrad_dy=NEAREST_RECIPE.wgrad_dy,
)  # fmt: skip


@pytest.fixture(autouse=True)
def from_the_start():
    torch._dynamo.reset()
    fp4compile.set_step(0)
    yield
    fp4compile.set_step(0)


def compiled(model: nn.Module, policy: dict):
    return torch.compile(model, backend="fp4", options={"policy": policy})


def assert_follows(model: nn.Module, run, x: torch.Tensor, recipe: Recipe) -> None:
    got = gradients(model, run, x)
    reference = with_recipe(copy.deepcopy(model), recipe)
    want = gradients(reference, reference, x)
    assert all(relative(got[name], value) < 2e-3 for name, value in want.items())


def test_the_forward_switches_at_its_step_with_one_compilation_and_no_change_of_the_loop() -> None:
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run = compiled(model, FORWARD_LATE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graphs = []
    for step in range(4):
        assert_follows(model, run, x, NEAREST_RECIPE if step < 2 else BACKWARD_ONLY)
        optimizer.step()
        graphs.append(len(fp4compile.last_report().graphs))
    assert graphs == [1, 1, 2, 2]
    early, late = fp4compile.last_report().graphs
    assert late.policy == f"{early.policy} from step 2"
    assert {row.role: row.precision for row in late.sites} == {"fprop": "float32", "dgrad": "nvfp4 W4A4", "wgrad": "nvfp4 W4A4"}


def test_the_same_for_all_roles_gives_the_plain_gradients() -> None:
    policy = {**NEAREST, "schedule": [{"from_step": 1, "fprop": "bf16", "backward": "high_precision"}]}
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run = compiled(model, policy)
    gradients(model, run, x)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    got, want = gradients(model, run, x), gradients(model, model, x)
    assert all(relative(got[name], value) < 1e-5 for name, value in want.items())


def test_layers_switch_alone() -> None:
    policy = {**NEAREST, "schedule": [{"from_step": 1, "match": "2", "precision": "high"}]}
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run = compiled(model, policy)
    gradients(model, run, x)
    fp4compile.set_step(1)
    gradients(model, run, x)
    late = fp4compile.last_report().graphs[-1]
    assert {row.name for row in late.sites if row.precision == "float32"} == {"2"}


def test_a_resumed_run_starts_where_it_was_and_going_back_takes_up_the_old_code() -> None:
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run = compiled(model, FORWARD_LATE)
    fp4compile.set_step(7)
    assert_follows(model, run, x, BACKWARD_ONLY)
    fp4compile.set_step(0)
    assert_follows(model, run, x, NEAREST_RECIPE)
    fp4compile.set_step(7)
    assert_follows(model, run, x, BACKWARD_ONLY)
    assert len(fp4compile.last_report().graphs) == 2


def test_evaluation_and_a_shape_that_changes_follow_the_schedule_too() -> None:
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run = compiled(model, FORWARD_LATE)
    with torch.no_grad():
        assert relative(run(x), model(x)) > 1e-2
    fp4compile.set_step(2)
    with torch.no_grad():
        assert relative(run(x), model(x)) < 1e-5
        assert relative(run(x[:5]), model(x[:5])) < 1e-5


def test_weights_that_only_the_old_phase_read_are_quantized_no_more() -> None:
    policy = {**NEAREST, "schedule": [{"from_step": 1, "fprop": "bf16", "backward": "high_precision"}]}
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run, optimizer = compiled(model, policy), torch.optim.SGD(model.parameters(), lr=0.1)
    gradients(model, run, x)
    optimizer.step()
    before = STORE.quantizations
    gradients(model, run, x)
    assert STORE.quantizations == before


def test_steps_are_those_of_the_busiest_optimizer_and_an_own_one_says_its_own() -> None:
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))]) for _ in range(2))
    for optimizer in (first, second, first, second, first):
        optimizer.step()
    assert fp4compile.current_step() == 3
    fp4compile.set_step(90_000)
    second.step()
    assert fp4compile.current_step() == 90_001 == CLOCK.step
    with pytest.raises(fp4compile.Fp4CompileError, match="set_step: found -1"):
        fp4compile.set_step(-1)


def test_a_scheduled_policy_in_a_compiled_optimizer_step() -> None:
    model, x = mlp(torch.float32), torch.randn(21, 40)
    run, optimizer = compiled(model, FORWARD_LATE), torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = torch.compile(optimizer.step)
    for _ in range(2):
        gradients(model, run, x)
        step()
    assert_follows(model, run, x, BACKWARD_ONLY)
