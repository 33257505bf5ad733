"""Outbound: the transformed graph to Inductor. Private torch API, the other file of two that may touch it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass

from fp4compile.passes.fold_weights import CutConstant, cut_constants
from fp4compile.passes.site import fake_of, input_of
from fp4compile.weights import WeightFreed, WeightStore

Transform = Callable[[fx.GraphModule], None]


class JointPass(CustomGraphPass):
    """Our pipeline as Inductor's joint-graph pass; `fingerprint` keys its caches."""

    def __init__(self, transform: Transform, fingerprint: str) -> None:
        self.transform = transform
        self.fingerprint = fingerprint

    def __call__(self, graph: fx.Graph) -> None:
        self.transform(graph.owning_module)

    def uuid(self) -> bytes:
        return self.fingerprint.encode()


def compile_with_inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    transform: Transform,
    fingerprint: str,
    mode: str,
    inductor: dict[str, Any],
    store: WeightStore,
    after_fold: Callable[[fx.GraphModule, Sequence[Any]], None],
) -> Callable[..., Any]:
    """Compile a Dynamo graph: `transform` on the joint graph, folded weights out of it, Inductor for the rest."""
    patches = {**list_mode_options(mode), **inductor}
    patches["joint_custom_pre_pass"] = JointPass(transform, fingerprint)

    def inner(inner_gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        return _compile_around_constants(inner_gm, inputs, store, after_fold, **kwargs)

    # AOTAutograd's own cache would hand back a graph compiled around constants without the callable that supplies them. Inductor's
    # FX graph cache, where the compile time is, stays on.
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, list(example_inputs), inner_compile=inner, config_patches=patches)


def trace_only(gm: fx.GraphModule, example_inputs: Sequence[Any], *, transform: Transform, fingerprint: str) -> Callable[..., Any]:
    """Run the joint graph through `transform` and execute it operator by operator; nothing is compiled."""

    def inner(inner_gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        return _boxed(lambda args: inner_gm(*args))

    patches = {"joint_custom_pre_pass": JointPass(transform, fingerprint)}
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, list(example_inputs), inner_compile=inner, config_patches=patches)


def _compile_around_constants(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    store: WeightStore,
    after_fold: Callable[[fx.GraphModule, Sequence[Any]], None],
    **kwargs: Any,
) -> Callable[[list[Any]], Any]:
    before = [n for n in gm.graph.nodes if n.op == "placeholder"]
    cuts = cut_constants(gm)
    if not cuts:
        return compile_fx_inner(gm, inputs, **kwargs)
    kept = [i for i, node in enumerate(before) if node.users or input_of(node) is None]
    for i, node in enumerate(before):
        if i not in set(kept):
            gm.graph.erase_node(node)
    gm.recompile()
    stored = [n for n in gm.graph.nodes if n.op == "placeholder"][len(kept) :]
    static = set(kwargs.get("static_input_idxs", ()))
    kwargs["static_input_idxs"] = [new for new, old in enumerate(kept) if old in static] + list(range(len(kept), len(kept) + len(stored)))
    new_inputs = [inputs[i] for i in kept] + [fake_of(n) for n in stored]
    compiled = compile_fx_inner(gm, new_inputs, **kwargs)
    only_folded = [i for i in range(len(before)) if i not in set(kept)]
    return _supplied(compiled, cuts, kept, only_folded, store, after_fold, gm)


def _supplied(
    compiled: Callable[[list[Any]], Any],
    cuts: list[CutConstant],
    kept: list[int],
    only_folded: list[int],
    store: WeightStore,
    after_fold: Callable[[fx.GraphModule, Sequence[Any]], None],
    gm: fx.GraphModule,
) -> Callable[[list[Any]], Any]:
    """A callable with the original inputs that adds the stored constants to those the graph still reads."""
    seen = False

    def run(args: list[Any]) -> Any:
        nonlocal seen
        call_args = [args[i] for i in kept]
        for arg in call_args:
            if store.freed and isinstance(arg, torch.Tensor) and store.is_freed(arg):
                raise WeightFreed(shape=tuple(arg.shape))
        for cut in cuts:
            values = store.fetch(cut.recipe, [args[i] for i in cut.inputs], cut.compute)
            call_args.extend(values[i] for i in cut.outputs)
        if not seen:
            seen = True
            after_fold(gm, [args[i] for i in only_folded])
        args.clear()
        return compiled(call_args)

    return _boxed(run)


def _boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    function._boxed_call = True  # type: ignore[attr-defined]
    return function
