"""Real joint graphs for tests: what our pipeline is handed by Inductor, taken out before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fp4compile import capture, handoff


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A joint graph as captured, and which of its flat inputs are parameters."""

    gm: fx.GraphModule
    parameters: dict[int, str]


def capture_graphs(
    model: Callable[..., Any], *args: Any, training: bool = False, dynamic: bool | None = None, **kwargs: Any
) -> list[Captured]:
    """Compile `model` far enough to see its joint graphs. `training` means a forward whose output needs gradients."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        parameters, buffers = capture.parameter_names(gm, example_inputs), capture.buffer_positions(gm)

        def keep(joint: fx.GraphModule) -> None:
            capture.mark_inputs(joint.graph, buffers)
            found.append(Captured(gm=copy_of(joint), parameters=parameters))

        return handoff.trace_only(gm, example_inputs, transform=keep, fingerprint="tests")

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph in a module of its own, with flat inputs, so that later rewrites of `gm` do not reach it."""
    graph = fx.Graph()
    outputs = graph.graph_copy(gm.graph, {})
    graph.output(outputs)
    return fx.GraphModule(gm, graph)


class Mlp(torch.nn.Module):
    """up, silu, down, with a bias on down."""

    def __init__(self, width: int = 32, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": torch.nn.Linear(width, hidden, bias=False), "down": torch.nn.Linear(hidden, width)})
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.nn.functional.silu(layer["up"](x)))
        return x


def tiny_llama(layers: int = 2) -> torch.nn.Module:
    """A Hugging Face Llama with random weights: width 32, two heads, vocabulary 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
