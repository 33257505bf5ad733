"""What is timed is what a compiled graph runs: the same layouts, on every target, as the pass that selects kernels chooses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fp4compile.bench.case import MatmulCase, quantize_cases
from fp4compile.bench.ours import Product, activation, dense_weight, dense_weights, offsets
from fp4compile.codegen.target import Target
from fp4compile.passes.fold_weights import FoldWeights
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.select_kernels import SelectKernels
from tests.passes.harness import W4A4, W4A16, apply, decide_forward
from tests.passes.linear_ref import SETUP

CPU = torch.device("cpu")
TARGETS = [
    Target(name="cpu", device_type="cpu"),
    *(Target(name=f"sm_{c}", device_type="cuda", capability=c) for c in (80, 90, 100, 120)),
]
SHAPES = [(1, 128, 256), (65, 128, 256), (3, 33, 256), (100, 48, 144)]


@pytest.mark.parametrize("activation", ["bf16", "fp4"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_layouts_are_those_of_a_compiled_graph(target, m, n, k, activation) -> None:
    product = Product.of(MatmulCase(n=n, k=k, m=m, activation=activation), target, CPU)
    decide = decide_forward(W4A4 if activation == "fp4" else W4A16)
    linear, x = nn.Linear(k, n, bias=False).bfloat16(), torch.randn(m, k, dtype=torch.bfloat16)
    got = apply(linear, x, setup=[*SETUP, InsertQuantize(), FoldWeights()], passes=[SelectKernels()], decide=decide, target=target)
    in_graph = {side: re.findall(rf"\b{side}_layout='(\w+)'", got.after) for side in "ab"}
    assert in_graph == {
        "a": [str(product.a_layout)] * (product.a_layout != "plain"),
        "b": [str(product.b_layout)] * (product.b_layout != "plain"),
    }
    assert product.kernel in got.after


def test_copies_differ_and_are_the_same_every_time() -> None:
    first, again, second = (dense_weight(8, 16, CPU, i) for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    x = activation(5, 64, CPU)
    assert x.shape == (5, 64) and x.isfinite().all() and x.abs().max() > 8 * x.abs().float().median()


@pytest.mark.parametrize("m", [1, 7, 300])
def test_rows_are_split_unevenly_among_all_groups(m) -> None:
    case = MatmulCase(n=8, k=16, m=m, groups=6)
    offs = offsets(case, CPU)
    assert offs.dtype == torch.int32 and offs.shape == (6,) and offs[-1] == m and (offs.diff() >= 0).all()
    assert torch.equal(offs, offsets(case, CPU))
    counts = torch.diff(offs, prepend=offs.new_zeros(1))
    assert m < 300 or (counts.min() > 0 and counts.max() > 2 * counts.min())
    groups = Product.of(case, TARGETS[0], CPU).group_of_rows(torch.arange(m))
    assert torch.equal(torch.bincount(groups, minlength=6), counts)
    assert dense_weights(case, CPU, 0).shape == (6, 8, 16)


def test_formats_choose_the_quantizers_that_are_measured() -> None:
    every, mx = quantize_cases([(32, 64)], ("nvfp4", "mxfp4")), quantize_cases([(32, 64)], ("mxfp4",))
    assert {case.config.format for case in mx} == {"mxfp4"} and len(every) > len(mx)
    assert len({case.key for case in every}) == len(every)
