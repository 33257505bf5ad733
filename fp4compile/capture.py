"""Inbound: what torch hands a backend, read into plain values. Private torch API, the one file of two that may touch it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import GlobalStateSource
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._guards import CompileContext, Guard, TracingContext, tracing

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.passes.module_path import readable_path
from fp4compile.passes.site import set_input


class NoGuard(Fp4CompileError, RuntimeError):
    template = (
        "{name} decides what is compiled, but the graph did not come from Dynamo, which would notice a change. "
        "Compile with torch.compile, or give a policy without [[schedule]]."
    )


def parameter_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, str]:
    """Flat input position -> fully qualified name, for the inputs of a Dynamo graph that are parameters."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    names: dict[int, str] = {}
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if isinstance(value, torch.nn.Parameter):
            names[position] = _source_name(node) or node.name
    return names


def parameter_values(positions: Iterable[int], example_inputs: Sequence[Any]) -> Mapping[int, torch.Tensor]:
    """Flat input position -> parameter. Held weakly: what is compiled must not keep a model alive."""
    return weakref.WeakValueDictionary({position: example_inputs[position] for position in positions})


def buffer_positions(gm: fx.GraphModule) -> frozenset[int]:
    """Flat positions of the inputs of a Dynamo graph that are buffers of a module."""
    placeholders = (n for n in gm.graph.nodes if n.op == "placeholder")
    return frozenset(position for position, node in enumerate(placeholders) if "_buffers" in _source(node))


def _source_name(node: fx.Node) -> str:
    return readable_path(_source(node))


def _source(node: fx.Node) -> str:
    """As in `L['self']._modules['up']._buffers['mask']`."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    # A method before torch 2.12, a property since.
    return str(source.name() if callable(source.name) else source.name)


def mark_inputs(graph: fx.Graph, buffers: Container[int] = ()) -> None:
    """Note on each placeholder of an AOT graph which of Dynamo's inputs it is, and whether it is a buffer."""
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(described := node.meta.get("desc"), PlainAOTInput):
            set_input(node, described.idx, buffer=described.idx in buffers)


def recompile_when_changed(value: Callable[[], object], name: str) -> None:
    """Have Dynamo compile the frame at hand again, or take up an earlier compilation, once `value()` is another than now.

    Raises `NoGuard` where no frame is being compiled.
    """
    context = TracingContext.try_get()
    if context is None:
        raise NoGuard(name=name)
    found = value()

    def add_guard(builder: Any, guard: Guard) -> None:
        add = builder.guard_manager.root.add_lambda_guard
        parts: tuple[Any, ...] = (lambda _: value() == found, [f"fp4compile: {name} == {found!r}"])
        # The third argument, a stack to show, came with torch 2.12; pybind says which there are.
        add(*parts, None) if "arg2" in (add.__doc__ or "") else add(*parts)

    context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(add_guard))


def count_apart() -> None:
    """What is compiled for the frame at hand shall not count when Dynamo compares the compilations of its code with `recompile_limit`.

    Dynamo counts those that matched the objects of the frame, by name of a local variable. Here the name is one that no frame has.
    """
    context = TracingContext.try_get()
    if context is None:
        return

    def add_guard(builder: Any, guard: Guard) -> None:
        builder.id_matched_objs["<dry run>"] = weakref.ref(count_apart)

    context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(add_guard))


def not_tracing() -> AbstractContextManager[Any]:
    """While a graph is traced, `torch.load` gives tensors without values; within this context it reads them."""
    return tracing(None)


def compile_id() -> str:
    """`0/1` for the second compilation of the first frame; `-` outside torch.compile."""
    current = CompileContext.current_compile_id()
    return "-" if current is None else str(current).replace("[", "").replace("]", "")


def device_of(example_inputs: Sequence[Any]) -> torch.device:
    """The device of the first CUDA input, else of the first tensor, else the CPU."""
    devices = [x.device for x in example_inputs if isinstance(x, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), devices[0] if devices else torch.device("cpu"))
