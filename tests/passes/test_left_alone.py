"""Whatever multiplies without being a matmul that passes rewrite is a row with its reason; reading a weight, it counts as fallen back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from fp4compile.passes.assign_precision import AssignPrecision
from fp4compile.passes.find_matmuls import FindMatmuls
from fp4compile.passes.normalize import Normalize
from tests.passes.harness import apply
from tests.passes.test_find_matmuls import Weight

SETUP = [Normalize(), FindMatmuls()]


@torch.library.custom_op("fp4compile_test::linear", mutates_args=())
def opaque_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.T


@torch.library.custom_op("fp4compile_test::look_up", mutates_args=())
def opaque_embedding(ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w[ids]


opaque_linear.register_fake(lambda x, w: x.new_empty(*x.shape[:-1], w.shape[0]))
opaque_embedding.register_fake(lambda ids, w: w.new_empty(*ids.shape, w.shape[1]))


@torch.compiler.nested_compile_region
def region(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ w) @ w


def on_condition(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: (x + 1) @ w, (x, w))


CASES = [
    ("addbmm", lambda x, w: torch.addbmm(w[0], x[None], w[None]), "a sum over batched products is left alone"),
    ("mv", lambda x, w: w @ x[0], "a matrix-vector product is bound by reading the matrix once"),
    ("addmv", lambda x, w: torch.addmv(w[0], w, x[0]), "a matrix-vector product is bound by reading the matrix once"),
    ("linear", lambda x, w: torch.ops.fp4compile_test.linear(x, w), "fp4compile_test::linear does not belong to torch"),
    ("invoke_subgraph", lambda x, w: region(region(x, w), w), "2 matmuls lie inside invoke_subgraph"),
    ("cond", on_condition, "2 matmuls lie inside cond"),
    ("_trilinear", lambda x, w: F.bilinear(x, x, w[None].expand(4, 32, 32)), "a bilinear form"),
]


@pytest.mark.parametrize(("op", "how", "reason"), CASES, ids=[c[0] for c in CASES])
def test_a_product_out_of_reach_is_a_row_and_an_error_under_strict(op, how, reason) -> None:
    model, x = Weight(32, 32, how=how), torch.randn(5, 32)
    got = apply(model, x, setup=SETUP, passes=[AssignPrecision()])
    row = next(r for r in got.record.sites if r.op == op)
    assert row.reason.startswith(reason) and row.fallback and row.precision == "float32"
    with pytest.raises(Exception, match=f"strict: .*{reason}"):
        apply(model, x, setup=SETUP, passes=[AssignPrecision()], strict=True)


def test_what_was_never_meant_for_4_bits_is_a_row_but_no_fallback() -> None:
    q = torch.randn(1, 2, 128, 16)
    for attention in (F.scaled_dot_product_attention, flex_attention):
        got = apply(lambda q, attention=attention: attention(q, q, q), q, setup=SETUP, passes=[AssignPrecision()], strict=True)
        assert [r.reason for r in got.record.sites] == ["attention is computed by one fused operator, which keeps its precision"]


def test_the_fast_path_of_an_encoder_layer_says_how_to_open_it() -> None:
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 3, 32)
    got = apply(layer, x, setup=SETUP, passes=[AssignPrecision()])
    assert [(r.op, r.fallback) for r in got.record.sites] == [("_transformer_encoder_layer_fwd", True)]
    assert "set_fastpath_enabled(False)" in got.record.sites[0].reason
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        opened = apply(layer, x, setup=SETUP, passes=[AssignPrecision()])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [r.name for r in opened.record.sites if r.role == "fprop"][-2:] == ["linear1", "linear2"]


def test_a_product_of_one_row_and_one_column_is_named() -> None:
    got = apply(Weight(32, 1, how=torch.matmul), torch.randn(1, 32), setup=SETUP, passes=[AssignPrecision()])
    assert [(r.op, r.reason, r.fallback) for r in got.record.sites] == [
        ("mm", "too small for a matmul: it is computed as a sum of products", False)
    ]


def test_a_look_up_in_a_weight_is_no_product() -> None:
    model = Weight(32, 32, how=lambda ids, w: torch.ops.fp4compile_test.look_up(ids, w))
    assert apply(model, torch.tensor([1, 2]), setup=SETUP, passes=[AssignPrecision()]).record.sites == []
