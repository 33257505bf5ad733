"""Coverage is by graph, not by class: whoever writes a matmul, it becomes a site with the right role, sizes and weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4compile.passes.find_matmuls import FindMatmuls
from fp4compile.passes.normalize import Normalize
from tests.passes.harness import SharedInput, TwoLayers, apply, check_golden
from tests.passes.own_backward import Traced, TwoWeights

FIND = [FindMatmuls()]


def sites(model, *args, **kwargs):
    return apply(model, *args, setup=[Normalize()], passes=FIND, **kwargs)


class Weight(nn.Module):
    """A raw parameter, used as `how` says."""

    def __init__(self, *shape: int, how, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape, dtype=dtype))
        self.how = how

    def forward(self, x):
        return self.how(x, self.w)


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is (K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 48)), nn.Parameter(torch.randn(48))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 32), self.weight)


def test_linear_with_and_without_bias() -> None:
    got = sites(TwoLayers(), torch.randn(2, 5, 32, dtype=torch.bfloat16))
    up, down = got.site("up"), got.site("down")
    assert (up.m, up.n, up.k, up.op, up.class_name) == (10, 40, 32, "addmm", "Linear")
    assert (down.m, down.n, down.k, down.op, down.depth, down.layers) == (10, 32, 40, "mm", 1, 2)
    assert up.rhs.parameter == "up.weight" and up.rhs.axis == -1 and up.lhs.kind == "activation"
    assert got.changed == [2] == got.changed_again


def test_conv1d_weight_is_quantized_along_its_first_dimension() -> None:
    site = sites(nn.Sequential(Conv1D()), torch.randn(5, 32)).site("0")
    assert (site.n, site.k, site.rhs.axis, site.rhs.kind) == (48, 32, -2, "weight")


@pytest.mark.parametrize(
    ("shape", "how", "n", "op"),
    [
        ((48, 32), F.linear, 48, "mm"),
        ((32, 48), lambda x, w: x @ w, 48, "mm"),
        ((32, 48), lambda x, w: torch.einsum("bsk,kn->bsn", x, w), 48, None),
        ((48, 32), lambda x, w: torch.einsum("bsk,nk->bsn", x, w), 48, None),
        ((32, 48), lambda x, w: torch.tensordot(x, w, dims=([2], [0])), 48, "mm"),
        ((2, 32, 48), lambda x, w: torch.bmm(x, w), 48, "bmm"),
        ((2, 48, 32), lambda x, w: torch.bmm(x, w.transpose(1, 2)), 48, "bmm"),
        ((96, 32), lambda x, w: F.linear(x, w[48:]), 48, "mm"),
        ((48, 32), lambda x, w: F.linear(x, w * 2.0), 48, "mm"),
    ],
    ids=["linear", "matmul", "einsum", "einsum-t", "tensordot", "bmm", "bmm-t", "slice", "scaled-weight"],
)
def test_functional_matmuls_of_a_parameter_are_fprop_sites(shape, how, n, op) -> None:
    got = sites(Weight(*shape, how=how), torch.randn(2, 5, 32))
    site = next(s for s in got.sites if s.role == "fprop")
    assert (site.n, site.k) == (n, 32) and not site.refusal
    assert op is None or site.op == op
    assert [o.kind for o in (site.lhs, site.rhs)].count("weight") == 1


def test_grouped_experts_are_one_site() -> None:
    def experts(x, w):
        return torch._grouped_mm(x, w, offs=torch.tensor([4, 10], dtype=torch.int32))

    got = sites(Weight(2, 32, 48, how=experts, dtype=torch.bfloat16), torch.randn(10, 32, dtype=torch.bfloat16))
    site = got.site("w")
    assert (site.op, site.m, site.n, site.k, site.role, site.refusal) == ("_grouped_mm", 10, 48, 32, "fprop", "")


def test_product_of_activations_is_no_layer() -> None:
    site = sites(lambda x: x @ x.mT, torch.randn(2, 5, 32)).sites[0]
    assert (site.role, site.batch, site.m, site.n, site.k) == ("matmul", 2, 5, 5, 32)


def test_training_roles_share_the_layer_of_their_forward() -> None:
    got = sites(TwoLayers(), torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True), training=True)
    roles = {(s.name, str(s.role)) for s in got.sites}
    assert roles == {(name, role) for name in ("up", "down") for role in ("fprop", "dgrad", "wgrad")}
    wgrad, dgrad = got.site("down", "wgrad"), got.site("down", "dgrad")
    assert {o.kind for o in (wgrad.lhs, wgrad.rhs)} == {"activation", "gradient"} and wgrad.k == 6
    assert {o.kind for o in (dgrad.lhs, dgrad.rhs)} == {"weight", "gradient"} and dgrad.k == 32
    assert wgrad.depth == dgrad.depth == 1


def test_dynamic_sizes_stay_symbols() -> None:
    site = sites(TwoLayers(), torch.randn(6, 32, dtype=torch.bfloat16), dynamic=True).site("up")
    assert isinstance(site.m, torch.SymInt) and site.k == 32


@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        (nn.Linear(8, 8, dtype=torch.float64), (torch.randn(2, 8, dtype=torch.float64),), "dtype float64 is not float32"),
        (lambda a, b: a @ b, (torch.randn(2, 8, dtype=torch.complex64), torch.randn(8, 2, dtype=torch.complex64)), "dtype complex64"),
        (nn.Linear(8, 4), (torch.randn(0, 8),), "a dimension is zero"),
        (nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),), "3x3 convolution overlap"),
        (lambda q: F.scaled_dot_product_attention(q, q, q), (torch.randn(1, 2, 8, 16),), "attention is computed by one fused operator"),
    ],
    ids=["float64", "complex", "empty", "convolution", "attention"],
)
def test_refusals_say_why(model, args, reason) -> None:
    assert reason in sites(model, *args).sites[0].refusal


def test_wgrad_of_experts_is_refused_because_groups_cut_its_contraction() -> None:
    def experts(x, w):
        return torch._grouped_mm(x, w, offs=torch.tensor([16, 32], dtype=torch.int32))

    model = Weight(2, 32, 48, how=experts, dtype=torch.bfloat16)
    got = sites(model, torch.randn(32, 32, dtype=torch.bfloat16), training=True)
    assert "blocks must not cross groups" in got.site("w", "wgrad").refusal


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.up = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.up(self.embed(ids)))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choose, self.up = nn.Linear(32, 8), nn.Linear(32, 32)

    def forward(self, x):
        weights, experts = torch.topk(torch.softmax(self.choose(x).float(), dim=-1), 2)
        return self.up(x) * weights.sum(-1, keepdim=True), experts


def test_tied_head_is_known_from_the_graph() -> None:
    got = sites(TiedHead(), torch.randint(0, 64, (2, 5)))
    head = next(s for s in got.sites if s.n == 64)
    assert head.traits == {"tied", "head"} and got.site("up").traits == frozenset()


def test_router_is_known_by_what_it_feeds() -> None:
    got = sites(Router(), torch.randn(5, 32))
    assert got.site("choose").traits == {"router"} and got.site("up").traits == frozenset()


def test_attention_products_are_known_by_their_softmax() -> None:
    got = sites(lambda x: (x @ x.mT).softmax(-1) @ x, torch.randn(2, 5, 32))
    assert [s.traits for s in got.sites] == [{"attention"}, {"attention"}]


def test_names_tell_matmuls_of_one_module_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(32, 32)

        def forward(self, x):
            return self.up(self.up(x))

    assert [s.name for s in sites(Twice(), torch.randn(5, 32)).sites] == ["up", "up#2"]


def test_a_childs_weight_read_from_outside_has_the_childs_name() -> None:
    """Mamba multiplies by `dt_proj.weight` itself; a rule on `dt_proj` must find that."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dt_proj, self.tied = nn.Linear(32, 48), nn.Linear(32, 32)

        def forward(self, x, other):
            return self.dt_proj.weight @ x.mT, F.linear(x, other)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer, self.head = Mixer(), nn.Linear(32, 32)

        def forward(self, x):
            return self.mixer(x, self.head.weight)

    assert [s.name for s in sites(Model(), torch.randn(5, 32)).sites] == ["mixer.dt_proj", "mixer"]


def test_slices_of_one_parameter_bear_its_name() -> None:
    attention, (q, k, v) = nn.MultiheadAttention(32, 4), torch.randn(3, 5, 2, 32)
    got = sites(nn.ModuleDict({"attn": attention})["attn"], q, k, v)
    names = [s.name for s in got.sites if s.role == "fprop"]
    assert names == ["in_proj_weight", "in_proj_weight#2", "in_proj_weight#3", "out_proj"]


def test_a_weight_that_the_graph_writes_to_is_still_a_weight() -> None:
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(32, 32)

        def forward(self, x):
            before = self.up(x)
            self.up.weight.mul_(0.5)
            return before, self.up(x)

    got = sites(Decays(), torch.randn(5, 32))
    assert [(s.name, s.role, s.rhs.kind) for s in got.sites] == [("up", "fprop", "weight"), ("up#2", "fprop", "weight")]


class MergedAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(32, 48), nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(48, 4))

    def forward(self, x):
        return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)


def test_merging_an_adapter_is_no_layer_but_the_merged_weight_is_one() -> None:
    got = sites(nn.Sequential(MergedAdapter()), torch.randn(5, 32), training=True)
    merge, layer, *backward = got.sites
    assert (merge.name, merge.role, layer.name, layer.role) == ("0.b", "matmul", "0", "fprop")
    assert merge.refusal.startswith("multiplies parameters") and layer.rhs.kind == "weight"
    assert [s.role for s in backward] == ["wgrad", "matmul", "matmul"]  # of the layer; of the two factors


class LearnedQueries(nn.Module):
    """As in a Perceiver or DETR: the queries are parameters, and their projection reads no input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 32))
        self.q, self.kv = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x):
        keys = self.kv(x).unflatten(-1, (2, 16)).transpose(1, 2)
        queries = self.q(self.queries).unflatten(-1, (2, 16)).transpose(0, 1)
        return (queries @ keys.mT).softmax(-1) @ keys


def test_attention_from_learned_queries_is_attention_in_both_directions() -> None:
    got = sites(LearnedQueries(), torch.randn(2, 5, 32), training=True)
    assert {s.role for s in got.sites if s.op == "bmm"} == {"matmul"}
    assert all("attention" in s.traits for s in got.sites if s.op == "bmm")
    assert [s.role for s in got.sites if s.name == "kv"] == ["fprop", "wgrad"]


class Masked(nn.Module):
    """What a pruned layer multiplies by: a parameter under a mask that is a buffer."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.w, self.writes = nn.Parameter(torch.randn(32, 32)), writes
        self.register_buffer("mask", torch.ones(32, 32))

    def forward(self, x):
        if self.writes:
            self.mask.mul_(x.sum() > 0)
        return x @ (self.w * self.mask).tril()


def test_a_parameter_under_a_fixed_mask_is_a_weight_and_under_a_changing_one_it_is_not() -> None:
    (fixed,) = sites(Masked(), torch.randn(5, 32)).sites
    (changing,) = sites(Masked(writes=True), torch.randn(5, 32)).sites
    assert (fixed.role, fixed.rhs.kind) == ("fprop", "weight")
    assert (changing.role, changing.rhs.kind) == ("matmul", "activation")


def test_neither_a_buffer_nor_a_looked_up_embedding_is_a_weight() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 32)
            self.register_buffer("frequencies", torch.randn(32, 3))
            self.register_buffer("at", torch.arange(5))

        def forward(self, x):
            return x @ self.frequencies, x @ self.table(self.at).T, self.table.weight[:5] @ x.T

    got = sites(Positions(), torch.randn(5, 32))
    assert [s.role for s in got.sites] == ["matmul", "matmul", "fprop"]


def test_golden_sites_do_not_change_the_graph(accept: bool) -> None:
    got = sites(SharedInput(), torch.randn(2, 3, 32, dtype=torch.bfloat16))
    check_golden("find_matmuls/shared_input", got.before, got.after, accept)
    assert got.same_code


class Scores(nn.Module):
    def __init__(self, classes: int = 24, vocabulary: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 16)
        self.first, self.square, self.last = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, classes)

    def forward(self, ids):
        return self.last(torch.relu(self.square(torch.relu(self.first(self.table(ids))))))


def traits_by_depth(model: nn.Module, *args) -> list[tuple[str, bool, int]]:
    got = apply(model, *args, passes=[FindMatmuls()])
    assert {s.layers for s in got.sites} == {sum("head" not in s.traits for s in got.sites)}
    return [(s.name, "head" in s.traits, s.depth) for s in got.sites]


def test_a_head_is_known_from_the_vocabulary_or_from_the_loss_and_is_no_layer() -> None:
    ids = torch.randint(0, 24, (5,))
    assert traits_by_depth(Scores(), ids) == [("first", False, 0), ("square", False, 1), ("last", True, -1)]
    assert traits_by_depth(Scores(vocabulary=25), ids)[-1] == ("last", False, 2)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scores(classes=7)

        def forward(self, ids, target):
            return F.cross_entropy(self.inner(ids), target)

    assert traits_by_depth(WithLoss(), ids, ids % 7)[-1] == ("inner.last", True, -1)


@pytest.mark.parametrize("layer", [TwoWeights, Traced])
def test_products_of_an_autograd_function_have_the_roles_and_names_of_their_own_weights(layer: type[nn.Module]) -> None:
    got = sites(layer(), torch.randn(2, 16, 32, requires_grad=True), training=True)
    assert sorted((site.name, str(site.role)) for site in got.sites) == [
        (f"weights.{i}", role) for i in range(2) for role in ("dgrad", "fprop", "wgrad")
    ]
