"""One value is quantized once, and a stochastic draw is never shared."""

from __future__ import annotations

import torch

from fp4compile.codegen import ops
from fp4compile.passes.insert_hadamard import InsertHadamard
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.share_quantize import ShareQuantize
from tests.passes.harness import SharedInput, apply, check_golden, decide_training
from tests.passes.linear_ref import BF16, PLAIN, SETUP, linear_ref


def test_share_quantize(accept: bool) -> None:
    model, x = SharedInput(), torch.randn(2, 3, 32, dtype=BF16)
    got = apply(model, x, setup=[*SETUP, InsertQuantize()], passes=[ShareQuantize()])
    check_golden("share_quantize/qkv", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0] and got.count(ops.QUANTIZE) == 4
    for out, layer in zip(got.output, (model.q, model.k, model.v), strict=True):
        torch.testing.assert_close(out, linear_ref(x, layer, PLAIN), rtol=2**-8, atol=1e-5)


def test_share_quantize_never_merges_stochastic_draws() -> None:
    x = torch.randn(6, 32, dtype=BF16, requires_grad=True)
    got = apply(
        SharedInput(),
        x,
        setup=[*SETUP, InsertHadamard(), InsertQuantize()],
        passes=[ShareQuantize()],
        decide=decide_training,
        training=True,
    )
    stochastic = 3 * 2  # dY of each layer, once for dgrad and once for wgrad
    assert got.after.count("'stochastic'") == stochastic
