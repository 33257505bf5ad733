"""The printed text computes what the graph computes, reads the same every time, and tells nothing about the machine."""

from __future__ import annotations

import math
import operator
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import fx

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.ops import QUANTIZE, SCALED_MM, quantize_args
from fp4compile.passes.printer import constants_of, print_graph
from fp4compile.passes.site import Constant, set_constant, set_kernel
from fp4compile.passes.value_names import ValueNames
from tests.captured_graphs import Captured, Mlp, capture_graphs, tiny_llama

aten = torch.ops.aten


def run_text(text: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "printed"}
    exec(compile(text, "printed", "exec"), namespace)
    return namespace


def assert_same_as_graph(gm: fx.GraphModule) -> str:
    """Run the text and fx's own interpreter on the same inputs; every output must agree bit for bit."""
    text = print_graph(gm, runs_alone=True)
    namespace = run_text(text)
    torch.manual_seed(0)
    inputs = namespace["example_inputs"]()
    inputs = inputs[: len(inputs) - len(constants_of(gm))]
    torch.manual_seed(1)
    expected = fx.Interpreter(gm).run(*cloned(inputs), enable_io_processing=False)
    torch.manual_seed(1)
    found = namespace["graph"](*cloned(inputs), *constants_of(gm))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    tensors = [v for v in torch.utils._pytree.tree_leaves(expected) if isinstance(v, torch.Tensor)]
    assert tensors
    assert any(t.is_floating_point() and t.count_nonzero() for t in tensors), "a graph of zeros would agree with anything"
    return text


def cloned(values: list[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in values]


def only(captured: list[Captured]) -> fx.GraphModule:
    assert len(captured) == 1
    return captured[0].gm


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_llama_text_computes_the_graph(training: bool, dynamic: bool) -> None:
    ids = torch.randint(0, 64, (2, 16))
    gm = only(capture_graphs(tiny_llama(layers=1), input_ids=ids, labels=ids if training else None, training=training, dynamic=dynamic))
    text = assert_same_as_graph(gm)
    assert "model.layers.0.mlp.down_proj" in text
    assert ("# backward | model.layers.0.mlp.down_proj" in text) == training
    assert bool(re.search(r"size_\d+ = operator\.mul\(p\d+, p\d+\)  # s\d+\*s\d+", text)) == dynamic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mlp_training_text_computes_the_graph(dtype: torch.dtype) -> None:
    gm = only(capture_graphs(Mlp().to(dtype), torch.randn(3, 5, 32, dtype=dtype, requires_grad=True), training=True))
    text = assert_same_as_graph(gm)
    assert f"  # {'bf16' if dtype is torch.bfloat16 else 'f32'}[15, 64]" in text


def test_higher_order_operator_prints_its_branches_as_functions() -> None:
    scale = torch.tensor([2.0, 3.0])

    def choose(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda v: v.sin() * scale, lambda v: v.cos(), (x,))

    # Inductor shows the branches on their own first, then the graph around them.
    text = assert_same_as_graph(capture_graphs(choose, torch.randn(4, 2))[-1].gm)
    assert len(re.findall(r"^    def \w+\(", text, re.MULTILINE)) == 2
    assert "torch.ops.higher_order.cond(" in text


def test_dropout_and_index_put_agree() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(8, 16)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            x = torch.nn.functional.dropout(x + self.table(at), 0.5, training=True)
            return x.index_put((at,), x.new_full((), float("-inf"))).clamp(min=-3.0)

    assert_same_as_graph(only(capture_graphs(Odd(), torch.randn(4, 16), torch.tensor([1, 2, 3, 0]), training=True)))


def graph_of(*lines: tuple[Any, tuple[Any, ...], dict[str, Any]], inputs: int = 1) -> fx.GraphModule:
    """A graph of calls; an int wrapped in `Ref` stands for the result of that line, a negative one for an input."""
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    graph = gm.graph
    nodes = {-1 - i: graph.placeholder(f"x{i}") for i in range(inputs)}
    for i, (target, args, kwargs) in enumerate(lines):
        args, kwargs = torch.utils._pytree.tree_map_only(Ref, lambda r: nodes[r.index], (args, kwargs))
        nodes[i] = graph.call_function(target, args, kwargs)
    graph.output([nodes[i] for i in range(len(lines))])
    return gm


class Ref:
    def __init__(self, index: int) -> None:
        self.index = index


X = Ref(-1)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten.full.default, ([2, 3], float("inf")), {"dtype": torch.bfloat16, "device": torch.device("cpu"), "layout": torch.strided}),
        (aten.full.default, ([2], float("nan")), {}),
        (aten.full.default, ([2], -0.0), {}),
        (aten.full.default, ([2], complex(1, float("-inf"))), {"dtype": torch.complex64}),
        (aten.clone.default, (X,), {"memory_format": torch.contiguous_format}),
        (aten.add.Tensor, (X, 1), {"alpha": 3}),
        (aten.index.Tensor, (X, [None, torch.tensor([1, 0])]), {}),
        (operator.getitem, (X, (slice(None, 1, None), Ellipsis)), {}),
        (aten.div.Tensor_mode, (X, 2.0), {"rounding_mode": "floor"}),
        (aten.mean.dim, (X, [-1], True), {"dtype": torch.float64}),
        (math.floor, (2.5,), {}),
        (torch.sym_max, (3, 4), {}),
        (max, (3, 4), {}),
        (aten.bernoulli.default, (aten.new_full(torch.empty(2), [2], 0.5),), {"generator": torch.Generator().manual_seed(3)}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_every_kind_of_literal_runs(target: Any, args: Any, kwargs: Any) -> None:
    gm = graph_of((target, args, kwargs))
    x = torch.arange(6.0).reshape(2, 3)
    constants = constants_of(gm)
    for generator in (c for c in constants if isinstance(c, torch.Generator)):
        generator.manual_seed(3)
    expected = fx.Interpreter(gm).run(x)
    for generator in (c for c in constants if isinstance(c, torch.Generator)):
        generator.manual_seed(3)
    found = run_text(print_graph(gm))["graph"](x, *constants)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if isinstance(expected[0], torch.Tensor):
        assert found[0].dtype == expected[0].dtype
        assert torch.equal(torch.signbit(found[0].real), torch.signbit(expected[0].real))


def test_constants_become_last_parameters_with_their_shape() -> None:
    graph = fx.Graph()
    module = torch.nn.Module()
    module.register_buffer("offset", torch.arange(3.0))
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.add.Tensor, (x, graph.get_attr("offset"))))
    gm = fx.GraphModule(module, graph)
    text = print_graph(gm)
    assert "    c0,  # f32[3], constant" in text
    torch.testing.assert_close(run_text(text)["graph"](torch.ones(3), *constants_of(gm)), torch.arange(1.0, 4.0))


def quantized_mm() -> tuple[fx.GraphModule, QuantConfig]:
    config = QuantConfig(format="nvfp4")
    quantized = [(QUANTIZE, (Ref(-1 - i), axis, *quantize_args(config)), {}) for i, axis in enumerate((-1, -2))]
    reads = [(operator.getitem, (Ref(i), j), {}) for i in range(2) for j in range(3)]
    a, b = [Ref(2), Ref(3), Ref(4)], [Ref(5), Ref(6), Ref(7)]
    gm = graph_of(*quantized, *reads, (SCALED_MM, (*a, *b, None, 48, torch.bfloat16), {}), inputs=2)
    return gm, config


def test_fp4_operators_name_their_settings_and_results() -> None:
    gm, _ = quantized_mm()
    text = print_graph(gm)
    expected = "quantize_0 = torch.ops.fp4.quantize.default(\n        p0, axis=-1, format='nvfp4', block='1x16', scale_rule='amax',"
    assert expected in text
    assert "scaled_mm.default(\n        quantize_0_codes, quantize_0_scales, quantize_0_global_scale, quantize_1_codes," in text
    assert "bias=None, k=48, out_dtype=torch.bfloat16" in text
    x, w = torch.randn(5, 48, dtype=torch.bfloat16), torch.randn(48, 7, dtype=torch.bfloat16)
    torch.testing.assert_close(run_text(text)["graph"](x, w), fx.Interpreter(gm).run(x, w), rtol=0, atol=0)


def test_marks_of_the_passes_show_as_comments() -> None:
    gm, _ = quantized_mm()
    quantize, product = (next(n for n in gm.graph.nodes if n.target is t) for t in (QUANTIZE, SCALED_MM))
    set_constant(quantize, Constant(parameters=(0,)))
    set_kernel(product, "cpu")
    text = print_graph(gm)
    assert text.count("kept in the weight store") == 1
    assert text.count("kernel cpu") == 1


def test_same_model_gives_the_same_text_and_none_of_the_machine() -> None:
    x = torch.randn(3, 5, 32)
    first, second = (print_graph(only(capture_graphs(Mlp(), x, training=True, dynamic=True)), runs_alone=True) for _ in range(2))
    assert first == second
    assert not re.search(r"0x[0-9a-f]{4,}|/\w+/|<\w+ ", first)


def test_names_stay_when_a_pass_inserts_a_node() -> None:
    gm = graph_of((aten.neg.default, (X,), {}), (aten.exp.default, (Ref(0),), {}), (aten.neg.default, (Ref(1),), {}))
    names = ValueNames()
    before = print_graph(gm, names=names)
    first = next(n for n in gm.graph.nodes if n.target is aten.neg.default)
    with gm.graph.inserting_before(first):
        gm.graph.call_function(aten.neg.default, first.args)
    after = print_graph(gm, names=names).splitlines()
    assert [line for line in before.splitlines() if line not in after] == ["# 1 inputs, 3 operations, 0 of them fp4"]
    assert "    neg_2 = torch.ops.aten.neg.default(p0)" in after


def test_text_runs_as_a_script(tmp_path: Any) -> None:
    gm = only(capture_graphs(Mlp(), torch.randn(3, 32), dynamic=True))
    file = tmp_path / "graph.py"
    file.write_text(print_graph(gm, title="captured", runs_alone=True))
    assert file.read_text().startswith("# captured\n")
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "tensor(" in done.stdout
