"""Values, shapes and graphs that break quantizers: each equals the eager oracle, or is left alone for a reason that the report gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4compile
from fp4compile.codegen.errors import UnsupportedDevice
from tests.compat.oracle import assert_same, compile_fp4, precisions, relative, rows, under_oracle

W4A4 = "nvfp4 W4A4"


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(40, 24, bias=False, dtype=dtype)  # K = 40 is ragged


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5, 40)))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_any_magnitude(magnitude: float) -> None:
    assert_same(linear(), x() * magnitude)


def test_rows_of_very_different_magnitude_lose_the_small_one_as_the_format_says() -> None:
    assert_same(linear(), x() * torch.logspace(-6, 3, 5)[:, None])


def test_all_equal_blocks() -> None:
    assert_same(linear(), torch.full((5, 40), 1.7))


@torch.no_grad()
@pytest.mark.parametrize("zero", ["input", "weight", "both"])
def test_zeros_give_exact_zeros(zero: str) -> None:
    model, given = linear(), x()
    if zero != "input":
        model.weight.zero_()
    if zero != "weight":
        given.zero_()
    assert torch.equal(compile_fp4(model)(given), torch.zeros(5, 24))


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_is_seen_in_its_row_and_nowhere_else(bad: float) -> None:
    model, given = linear(), x()
    given[1, 3] = bad
    got, want = compile_fp4(model)(given), under_oracle(model, given)
    assert got[1].isnan().all()
    others = [0, 2, 3, 4]
    assert got[others].isfinite().all() and relative(got[others], want[others]) < 1e-5


@torch.no_grad()
def test_a_bad_weight_is_seen_in_its_column() -> None:
    model = linear()
    model.weight[7, 2] = float("nan")
    got = compile_fp4(model)(x())
    assert got[:, 7].isnan().all() and got.isnan().sum() == 5


LAYOUTS = {
    "transposed": lambda: x(40, 5).T,
    "expanded rows": lambda: x(1, 40).expand(5, 40),
    "expanded columns": lambda: x(5, 1).expand(5, 40),
    "every second": lambda: x(10, 80)[::2, ::2],
    "offset": lambda: x(6, 41)[1:, 1:],
    "batch of views": lambda: x(3, 40, 5).transpose(1, 2),
    "flipped": lambda: x().flip(1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str) -> None:
    assert_same(linear(), LAYOUTS[layout]())


BIASES = {
    "one element": lambda: x(1),
    "every second": lambda: x(48)[::2],
    "expanded": lambda: x(1).expand(24),
    "a matrix": lambda: x(5, 24),
    "a column": lambda: x(5, 1),
    "a scalar": lambda: x(1)[0],
    "bfloat16, cast": lambda: x(24).bfloat16().float(),
}


@pytest.mark.parametrize("kind", BIASES)
def test_any_bias(kind: str) -> None:
    w, bias = nn.Parameter(x(40, 24)), BIASES[kind]()
    for weights in ({}, {"beta": 0.5, "alpha": 2.0}):
        assert_same(lambda given, weights=weights: torch.addmm(bias, given, w, **weights), x(), parameters=[w])


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_row_and_a_vector(dynamic: bool) -> None:
    assert_same(linear(), x(1, 40), dynamic=dynamic)
    assert_same(linear(), x(40), dynamic=dynamic)


@torch.no_grad()
def test_no_rows() -> None:
    model = linear()
    assert compile_fp4(model, strict=True)(x(0, 40)).shape == (0, 24)
    (row,) = fp4compile.last_report().sites
    assert row.reason == "a dimension is zero" and not row.fallback


@torch.no_grad()
def test_no_rows_on_the_way_of_a_dynamic_graph() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(24, 8))
    run = compile_fp4(model, dynamic=True)
    for count in (4, 0, 1, 9):
        given = x(count, 40)
        assert run(given).shape == (count, 8)
        if count:
            assert relative(run(given), under_oracle(model, given)) < 1e-5


@torch.no_grad()
def test_rows_selected_by_their_values_may_be_none() -> None:
    """As tokens of an expert: the count is known only when the graph runs."""
    model = linear()

    def chosen(given):
        return model(given[given[:, 0] > 0])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compile_fp4(chosen)
        for sign in (1, -1):
            given = x()
            given[:, 0] = given[:, 0].abs() * sign
            want = under_oracle(chosen, given, parameters=[model.weight])
            got = run(given)
            assert got.shape == want.shape and (sign < 0 or relative(got, want) < 1e-5)
    assert precisions() == [W4A4]


def test_a_weight_used_plain_and_transposed() -> None:
    w = nn.Parameter(x(40, 40))
    assert_same(lambda given: (given @ w) @ w.T, x(), parameters=[w])
    assert precisions() == [W4A4, W4A4]


class SameWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(40, 40)
        self.b, self.c = self.a, nn.Linear(40, 40, bias=False)
        self.c.weight = self.a.weight

    def forward(self, given):
        return self.c(self.b(self.a(given)))


def test_the_same_weight_in_three_layers_is_quantized_once() -> None:
    from fp4compile.weights import STORE

    before = STORE.quantizations
    assert_same(SameWeight(), x())
    assert STORE.quantizations == before + 1 and precisions() == [W4A4] * 3


@torch.no_grad()
def test_an_output_written_over_the_input() -> None:
    model = nn.Linear(40, 40)

    def overwrite(given):
        given.copy_(model(given))
        return given

    first, second = x(), None
    second = first.clone()
    got, want = compile_fp4(overwrite)(first), under_oracle(overwrite, second, parameters=model.parameters())
    assert got.data_ptr() == first.data_ptr() and relative(first, want) < 1e-5


@torch.no_grad()
def test_a_cache_that_the_graph_writes_to_and_multiplies_by() -> None:
    """A buffer is an activation, and stays in high precision."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(40, 40)
            self.register_buffer("keys", torch.zeros(6, 40))

        def forward(self, given, at):
            self.keys.index_copy_(0, at, given)
            return self.q(given) @ self.keys.mT

    model = Cache()
    twin, run = copy.deepcopy(model), compile_fp4(model)
    for step in range(4):
        given, at = x(1, 40), torch.tensor([step])
        assert relative(run(given, at), under_oracle(twin, given, at)) < 1e-5
    assert torch.equal(model.keys, twin.keys)
    assert [(name, role) for name, role, _ in rows()] == [("q", "fprop"), ("mm", "matmul")] and precisions() == [W4A4, "float32"]


LEFT_ALONE = {
    "float64": (lambda given, w: given.double() @ w.double(), "float64"),
    "complex": (lambda given, w: given.to(torch.complex64) @ w.to(torch.complex64), "complex64"),
    "integer": (lambda given, w: given.long() @ w.long(), "int64"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LEFT_ALONE)
def test_a_dtype_without_4_bits_is_left_exactly_alone(case: str) -> None:
    how, dtype = LEFT_ALONE[case]
    w, given = nn.Parameter(x(40, 8)), x() * 3
    torch.testing.assert_close(compile_fp4(lambda t: how(t, w))(given), how(given, w))
    (row,) = fp4compile.last_report().sites
    assert row.precision == dtype and row.fallback and row.reason == f"dtype {dtype} is not float32, bfloat16 or float16"


def test_float16() -> None:
    assert_same(linear(torch.float16), x().half())


@torch.no_grad()
def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(Exception, match=UnsupportedDevice.__name__):
        compile_fp4(linear().to("meta"))(x().to("meta"))


def test_an_input_on_another_device_that_no_product_reads() -> None:
    w = nn.Parameter(x(40, 8))
    assert_same(lambda given, shape: given @ w, x(), torch.empty(3, device="meta"), parameters=[w])


def test_plain_tensors_are_activations() -> None:
    w = x(40, 8)
    with torch.no_grad():
        torch.testing.assert_close(compile_fp4(lambda given, w: given @ w)(x(), w).shape, torch.Size([5, 8]))
    assert rows() == [("mm", "matmul", "float32")]


@pytest.mark.parametrize("how", [torch.vmap, torch.func.vmap])
def test_vmap_over_rows(how) -> None:
    model = linear()
    assert_same(lambda given: how(lambda row: model(row))(given), x(), parameters=model.parameters())
    assert precisions() == [W4A4]


@torch.no_grad()
def test_a_gradient_taken_inside_the_graph_is_forward() -> None:
    """It is part of what the model computes, as in a force field; nothing says that a recipe's rules for gradients are meant."""
    w, given = nn.Parameter(x(40, 24)), x()
    got = compile_fp4(lambda given: torch.func.grad(lambda t: (t @ w).square().sum())(given))(given)
    assert relative(got, under_oracle(lambda given: (2 * (given @ w)) @ w.T, given, parameters=[w])) < 1e-5
    assert [role for _, role, _ in rows()] == ["fprop", "fprop"]


class Subclass(torch.Tensor):
    pass


@torch.no_grad()
def test_a_parameter_of_a_plain_subclass() -> None:
    model, given = linear(), x()
    want = under_oracle(model, given)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Subclass))
    assert relative(compile_fp4(model)(given).as_subclass(torch.Tensor), want) < 1e-5
    assert precisions() == [W4A4]


def test_only_the_input_needs_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 24)).requires_grad_(False)
    gradients = []
    for run in (compile_fp4(model), lambda given: under_oracle(model, given)):
        torch.manual_seed(1)
        given = x().requires_grad_()
        run(given).square().sum().backward()
        gradients.append(given.grad)
    assert relative(*gradients) < 1e-5
    assert sorted(role for _, role, _ in rows()) == ["dgrad", "dgrad", "fprop", "fprop"]


def test_attention_in_a_backward() -> None:
    model = nn.Linear(40, 40)

    def attend(given):
        return F.scaled_dot_product_attention(model(given), given, given)

    gradients = []
    for run in (compile_fp4(attend), lambda given: under_oracle(attend, given, parameters=model.parameters())):
        torch.manual_seed(1)
        given = x(2, 4, 16, 40).requires_grad_()
        run(given).square().sum().backward()
        gradients.append(given.grad)
    assert relative(*gradients) < 1e-5


@torch.no_grad()
def test_a_graph_without_matmuls_is_nobodys_error() -> None:
    policy = {"version": 1, "extends": "nvfp4", "rule": [{"match": "lm_head", "precision": "high"}]}
    assert torch.equal(compile_fp4(torch.relu, policy)(given := x()), given.relu()) and rows() == []


class Broken(nn.Module):
    """Dynamo cuts this into two graphs, and a policy sees one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, given):
        given = self.a(given)
        torch._dynamo.graph_break()
        return self.b(given)


@torch.no_grad()
def test_a_rule_for_the_other_side_of_a_graph_break() -> None:
    model, rule = Broken(), {"match": "b", "precision": "high"}
    policy = {"version": 1, "extends": "nvfp4", "rule": [rule]}
    with pytest.raises(Exception, match=r"Where the graph is only part of the model.* give the rule optional = true"):
        compile_fp4(model, policy)(x())
    compile_fp4(model, {**policy, "rule": [{**rule, "optional": True}]})(x())
    assert rows() == [("a", "fprop", W4A4), ("b", "fprop", "float32")]
