"""What people wrap around a model: generation, adapters, accumulation, checkpointing, autocast, parametrizations, modes, several models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fp4compile
from fp4compile.weights import STORE
from tests.compat.fake_quant_mode import FakeQuant
from tests.compat.families import BY_NAME
from tests.compat.oracle import assert_same, compile_fp4, precisions, relative, rows, under_oracle
from tests.fp4compile.eager_recipe import Recipe
from tests.fp4compile.test_training import NEAREST, NEAREST_RECIPE

W4A4 = "nvfp4 W4A4"


def mlp(width: int = 40) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 72), nn.GELU(), nn.Linear(72, 24))


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5, 40)))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generation_gives_the_oracles_tokens_and_quantizes_each_weight_once(cache: str) -> None:
    model = BY_NAME["llama"].build().eval()
    prompt = torch.randint(0, 100, (1, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "disable_compile": True}
    settings |= {"cache_implementation": "static"} if cache == "static" else {}
    with FakeQuant(model, Recipe()):
        want = model.generate(prompt, **settings)
    assert not torch.equal(want, model.generate(prompt, **settings))  # 4 bits choose other tokens: equality is no accident
    before = STORE.quantizations
    # Before torch 2.13 Inductor's C++ of a growing cache may not compile with its checks: `fp4compile doctor` says so.
    model.forward = compile_fp4(model.forward, inductor={"assert_indirect_indexing": False})
    assert torch.equal(model.generate(prompt, **settings), want)
    assert STORE.quantizations - before == 15
    assert len(fp4compile.last_report().graphs) >= 2  # prefill and decode


class Adapted(nn.Module):
    """A frozen base with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(40, 24).requires_grad_(False)
        self.a, self.b = nn.Parameter(x(4, 40) * 0.3), nn.Parameter(x(24, 4) * 0.3)

    def forward(self, given):
        return self.base(given) + given @ self.a.T @ self.b.T


class Merged(Adapted):
    def forward(self, given):
        return F.linear(given, self.base.weight + self.b @ self.a, self.base.bias)


@torch.no_grad()
def test_a_merged_adapter_is_quantized_anew_exactly_when_it_changes() -> None:
    model, given = Merged(), x()
    run = compile_fp4(model)
    for _ in range(3):
        assert relative(run(given), under_oracle(model, given)) < 1e-5
    before = STORE.quantizations
    run(given)
    assert STORE.quantizations == before
    model.b.mul_(-2)
    assert relative(run(given), under_oracle(model, given)) < 1e-5
    assert STORE.quantizations == before + 1


@pytest.mark.parametrize("kind", [Adapted, Merged])
def test_only_an_adapter_is_trained(kind: type[Adapted]) -> None:
    model, given = kind(), x(21, 40)
    assert_same_gradients(model, compile_fp4(model, NEAREST), lambda run: run(given).square().sum())
    assert model.base.weight.grad is None


def gradients(model: nn.Module, run: Callable, loss: Callable) -> list[torch.Tensor]:
    model.zero_grad()
    loss(run).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_gradients(model: nn.Module, run: Callable, loss: Callable, eager: Callable | None = None) -> None:
    """Under the deterministic pretraining recipe."""
    got, high = gradients(model, run, loss), gradients(model, eager or model, loss)
    with FakeQuant(model, NEAREST_RECIPE):
        want = gradients(model, eager or model, loss)
    assert len(got) == len(want) and all(relative(g, w) < 1e-4 for g, w in zip(got, want, strict=True))
    assert any(relative(h, w) > 1e-2 for h, w in zip(high, want, strict=True))


def test_gradients_accumulate_and_weights_are_quantized_once_a_step() -> None:
    model, batches = mlp(), [x(21, 40) for _ in range(3)]
    run = compile_fp4(model, NEAREST)
    assert_same_gradients(model, run, lambda run: sum(run(given).square().mean() for given in batches))
    before = STORE.quantizations
    for given in batches:
        run(given).square().mean().backward()
    assert STORE.quantizations == before
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for given in batches:
        run(given).square().mean().backward()
    assert 0 < STORE.quantizations - before <= 2 + 1  # both for fprop, and the second for dgrad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(40, 40), mlp()

        def forward(self, given):
            return checkpoint(self.inner, self.first(given), use_reentrant=reentrant)

    model, given = Checkpointed(), x(21, 40)
    plain = nn.Sequential(model.first, model.inner)
    assert_same_gradients(plain, compile_fp4(model, NEAREST), lambda run: run(given).square().sum(), eager=plain)


def test_checkpointing_from_outside() -> None:
    """Layers compiled one by one, inside an eager loop that checkpoints them."""
    model, given = nn.Sequential(mlp(), nn.Linear(24, 40), mlp()), x(21, 40)
    torch._dynamo.reset()
    layers = [torch.compile(layer, backend="fp4", options={"policy": NEAREST}) for layer in model]

    def run(given):
        for layer in layers:
            given = checkpoint(layer, given, use_reentrant=False)
        return given

    assert_same_gradients(model, run, lambda run: run(given).square().sum(), eager=model)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """Weights are quantized from what the product reads: their bf16 cast."""
    model, given = mlp(), x()

    def cast(given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(given)

    run = compile_fp4(cast if inside else model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        got, want = run(given), under_oracle(cast, given, parameters=model.parameters())
    assert got.dtype is torch.bfloat16 and precisions() == [W4A4, W4A4]
    assert relative(got, want) < 2e-2  # a bf16 rounding between the layers may flip a code


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


P = nn.utils.parametrizations


@pytest.mark.parametrize("change", [P.weight_norm, P.orthogonal, P.spectral_norm, pruned], ids=lambda change: change.__name__)
def test_a_parametrized_weight_is_quantized_once_for_all_calls(change) -> None:
    """Norms, rotations, masks: parameters and fixed buffers make a weight."""
    model, given = nn.Sequential(change(nn.Linear(40, 24))).eval(), x()
    before = STORE.quantizations
    assert_same(model, given)
    assert [name for name, role, precision in rows() if precision == W4A4] == ["0"]
    assert STORE.quantizations == before + 1


@torch.no_grad()
def test_a_changed_mask_changes_the_weight() -> None:
    model, given = nn.Sequential(pruned(nn.Linear(40, 24))), x()
    run = compile_fp4(model)
    run(given)
    model[0].weight_mask.fill_(1)
    twin = nn.Linear(40, 24)
    twin.weight, twin.bias = model[0].weight_orig, model[0].bias
    assert relative(run(given), under_oracle(twin, given)) < 1e-5


def test_slices_of_one_weight() -> None:
    w = nn.Parameter(x(72, 40))

    def three(given):
        return F.linear(given, w[:24]) + F.linear(given, w[24:48]) * F.linear(given, w[48:])

    assert_same(three, x(), parameters=[w])
    assert precisions() == [W4A4] * 3


def test_multi_head_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(40, 4, batch_first=True)

        def forward(self, given):
            return self.attention(given, given, given)[0]

    assert_same(Attends().train(), x(2, 7, 40))
    assert [(name, role) for name, role, precision in rows() if precision == W4A4] == [
        ("attention.in_proj_weight", "fprop"),
        ("attention.out_proj", "fprop"),
    ]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.lstm, self.head = nn.Linear(40, 32), nn.LSTM(32, 16), nn.Linear(16, 8)

    def forward(self, given):
        return self.head(self.lstm(self.up(given))[0])


@torch.no_grad()
def test_dynamo_does_not_trace_recurrent_layers_and_the_report_says_that_nothing_was_compiled() -> None:
    model, given = Recurrent(), x(6, 2, 40)
    assert torch.equal(compile_fp4(model)(given), model(given))
    assert "Dynamo captured no graph and the model ran as it is" in str(fp4compile.last_report())


@torch.no_grad()
def test_a_recurrent_layer_falls_through_and_its_neighbours_do_not() -> None:
    model, given = Recurrent(), x(6, 2, 40)
    want = under_oracle(model.head, model.lstm(under_oracle(model.up, given))[0])
    with torch._dynamo.config.patch(allow_rnn=True):
        assert relative(compile_fp4(model)(given), want) < 1e-5
    assert rows() == [("up", "fprop", W4A4), ("lstm", "fprop", "float32"), ("head", "fprop", W4A4)]
    assert fp4compile.last_report().fallbacks[0].reason == "a recurrent layer is computed by one operator"


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_inductors_modes(mode: str) -> None:
    torch._dynamo.reset()
    model, given = mlp(), x()
    want = compile_fp4(model, "nvfp4_a16")(given)
    torch._dynamo.reset()
    assert relative(torch.compile(model, backend="fp4", mode=mode)(given), want) < 1e-5  # `auto` is nvfp4_a16 on a CPU
    assert relative(compile_fp4(model, "nvfp4_a16", mode=mode)(given), want) < 1e-5


@torch.no_grad()
def test_two_models_and_two_policies_for_one_of_them() -> None:
    torch._dynamo.reset()
    first, second, given = mlp(), mlp(), x()
    runs = [torch.compile(model, backend="fp4", options={"policy": "nvfp4"}) for model in (first, second)]
    plain = torch.compile(first, backend="fp4", options={"policy": "bf16"})
    for _ in range(2):
        for run, model in zip(runs, (first, second), strict=True):
            assert relative(run(given), under_oracle(model, given)) < 1e-5
        torch.testing.assert_close(plain(given), first(given))
    assert len(fp4compile.last_report().graphs) == 2  # code of the first serves the second, with weights of its own


@torch.no_grad()
def test_reset_forgets_graphs_and_keeps_weights() -> None:
    model, given = mlp(), x()
    want = compile_fp4(model)(given)
    before = STORE.quantizations
    torch._dynamo.reset()
    assert fp4compile.last_report().sites == ()
    assert torch.equal(compile_fp4(model)(given), want) and STORE.quantizations == before


@torch.no_grad()
def test_shapes_that_change_recompile_once_to_a_dynamic_graph() -> None:
    model = mlp()
    run = compile_fp4(model)
    for count in (3, 5, 9, 17):
        given = x(count, 40)
        assert relative(run(given), under_oracle(model, given)) < 1e-5
    graphs = fp4compile.last_report().graphs
    assert [graph.sites[0].m.isdecimal() for graph in graphs] == [True, False]


def test_functions_in_functions_and_a_compiled_part_of_an_eager_model() -> None:
    model, given = mlp(), x()

    def outer(given):
        def inner(given, scale):
            return model(given * scale)

        return inner(given, 2.0) + inner(given, 0.5)

    assert_same(outer, given, parameters=model.parameters())
    assert precisions() == [W4A4] * 4

    twin = copy.deepcopy(model)
    twin[2] = torch.compile(twin[2], backend="fp4", options={"policy": "nvfp4"})
    with torch.no_grad():
        hidden = model[1](model[0](given))
        assert relative(twin(given), under_oracle(model[2], hidden)) < 1e-5


def test_einsum_and_matmul_spellings_of_one_layer() -> None:
    w = nn.Parameter(x(40, 24))
    spellings = (
        lambda given: given @ w,
        lambda given: torch.einsum("tk,kn->tn", given, w),
        lambda given: torch.tensordot(given, w, dims=1),
        lambda given: F.linear(given, w.T),
        lambda given: torch.addmm(torch.zeros(24), given, w),
        lambda given: given.unsqueeze(0).matmul(w)[0],
    )
    outputs = [assert_same(spelling, given, parameters=[w]) for given in [x()] for spelling in spellings]
    assert all(relative(out, outputs[0]) < 1e-6 for out in outputs)


def test_a_step_that_is_compiled_as_one_function() -> None:
    """Loss and backward in one compiled call, as in a plain training script."""
    model, given, target = mlp(), x(21, 40), torch.randint(0, 24, (21,))
    assert_same_gradients(
        model,
        compile_fp4(lambda given: F.cross_entropy(model(given), target), NEAREST),
        lambda run: run(given),
        eager=lambda given: F.cross_entropy(model(given), target),
    )
