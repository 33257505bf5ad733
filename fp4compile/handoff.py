"""Outbound: the transformed graph to Inductor. Private torch API, the other file of two that may touch it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fp4compile.capture import count_apart
from fp4compile.codegen.known_bad import Feature, known_bad
from fp4compile.codegen.target import target_of
from fp4compile.passes.fold_weights import CutConstant, cut_constants
from fp4compile.passes.site import fake_of, input_of
from fp4compile.weights import Reader, WeightFreed, WeightStore

Transform = Callable[[fx.GraphModule], None]
AfterFold = Callable[[Sequence[Any]], None]
OnBackward = Callable[[fx.Graph], None]
Runner = Callable[[fx.GraphModule], Callable[[list[Any]], Any]]


class JointPass(CustomGraphPass):
    """Our pipeline as Inductor's joint-graph pass; `fingerprint` keys its caches."""

    def __init__(self, transform: Transform, fingerprint: str) -> None:
        self.transform = transform
        self.fingerprint = fingerprint

    def __call__(self, graph: fx.Graph) -> None:
        gm = graph.owning_module
        assert gm is not None, "Inductor hands over the graph of a module"
        with unset_fake_temporarily():  # passes hold real constants too; what they ask of fake values stays fake
            self.transform(gm)

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
    after_fold: AfterFold,
    on_backward: OnBackward,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: `transform` on the joint graph, folded weights out of it, Inductor for the rest.

    `after_fold` gets, once, the parameters of a compiled graph that only its folded weights came from, and `on_backward` the backward's
    graph as torch split it off. Raises `WeightFreed` when the graph needs a weight in high precision that `free_weights` released.
    """
    freed = {i: x for i, x in enumerate(example_inputs) if isinstance(x, torch.nn.Parameter) and store.is_freed(x)}
    patches = {**list_mode_options(mode), **inductor}
    patches["joint_custom_pre_pass"] = JointPass(transform, fingerprint)

    def inner(inner_gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        if kwargs.get("is_backward"):
            on_backward(inner_gm.graph)
        cuts = cut_constants(inner_gm)
        for node in inner_gm.graph.nodes:
            if node.op == "placeholder" and node.users and input_of(node) in freed:
                raise WeightFreed(shape=tuple(fake_of(node).shape))
        if not cuts:
            return compile_fx_inner(inner_gm, inputs, **kwargs)
        return _compile_around_constants(inner_gm, inputs, cuts, store, after_fold, **kwargs)

    # AOTAutograd's own cache would hand back a graph compiled around constants without the callable that supplies them. Inductor's
    # FX graph cache, where the compile time is, stays on.
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, list(example_inputs), inner_compile=cast(Any, inner), config_patches=patches)  # type: ignore[return-value]


def compile_apart(model: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` outside of Dynamo's recompile limit for the code of `model`, in which the user's own compilations count.

    Beyond that limit (8) Dynamo runs the model as it is, and a dry run would see no graph. Before torch 2.13 we tell the two apart.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(model, backend=backend, **cast(Any, {"isolate_recompiles": True}))

    def apart(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        count_apart()
        return backend(gm, example_inputs)

    compiled = torch.compile(model, backend=apart)

    def run(*args: Any, **kwargs: Any) -> Any:
        with dynamo_config.patch(recompile_limit=sys.maxsize):
            return compiled(*args, **kwargs)

    return run


def rounding_like_eager(device: torch.device) -> dict[str, bool]:
    """Inductor's options under which a compiled graph rounds to bf16 wherever eager mode does, for comparisons with it.

    Between operators that it fuses Inductor keeps values in float32. Where it cannot be told not to, it fuses none of torch's operators.
    """
    deaf = any(row.feature is Feature.EAGER_ROUNDING for row in known_bad(target_of(device)))
    return {"emulate_precision_casts": True, "fallback_by_default": deaf}


def trace_only(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, transform: Transform, fingerprint: str, runner: Runner | None = None
) -> Callable[..., Any]:
    """Run the joint graph through `transform` and execute it operator by operator, or as `runner` does; nothing is compiled."""

    def inner(inner_gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        return _boxed(runner(inner_gm) if runner else lambda args: inner_gm(*args))

    # Inductor's own rewrites would only replace nodes that `transform` has marked.
    patches = {"joint_custom_pre_pass": JointPass(transform, fingerprint), "pattern_matcher": False, "joint_graph_constant_folding": False}
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, list(example_inputs), inner_compile=cast(Any, inner), config_patches=patches)  # type: ignore[return-value]


def _compile_around_constants(
    gm: fx.GraphModule, inputs: Sequence[Any], cuts: list[CutConstant], store: WeightStore, after_fold: AfterFold, **kwargs: Any
) -> Callable[[list[Any]], Any]:
    """Compile the graph that is left, and feed it: its own inputs that are still read, then what the store holds for each cut."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    own, stored = placeholders[: len(inputs)], placeholders[len(inputs) :]
    kept = [i for i, node in enumerate(own) if node.users or input_of(node) is None]
    folded = sorted(set(range(len(own))) - set(kept))
    for i in folded:
        gm.graph.erase_node(own[i])
    gm.recompile()
    static = set(kwargs.get("static_input_idxs", ()))
    kwargs["static_input_idxs"] = [new for new, old in enumerate(kept) if old in static] + [len(kept) + i for i in range(len(stored))]
    compiled = compile_fx_inner(gm, [*(inputs[i] for i in kept), *map(fake_of, stored)], **kwargs)
    reader = Reader(store=store, cuts=cuts)
    first = True

    def run(args: list[Any]) -> Any:
        nonlocal first
        call_args = [*[args[i] for i in kept], *reader.read(args)]
        if first:
            first = False
            after_fold([args[i] for i in folded])
        args.clear()
        return compiled(call_args)

    return _boxed(run)


def _boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    function._boxed_call = True  # type: ignore[attr-defined]
    return function
