"""GPTQ block by block, each Linear fitted to what it will really read: inputs that went through 4 bits, behind blocks that are quantized.

With x the input in high precision and y the same token's input in the quantized model, the weight that best turns y into W x is
W E[x y^T] E[y y^T]^-1; that is rounded under E[y y^T] (the idea of GPTAQ, arXiv 2504.02692). The blocks of a decoder are
run one after another, on hidden states that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from accuracy_layers import Inputs, QuantizedLinear, Whole, quantize_inputs, rounded
from accuracy_methods import Method
from torch import Tensor, nn

_DAMPING: Final = 0.01  # of the mean of the diagonal, as in GPTQ


class _Stop(Exception):
    """Nothing behind the first block is needed."""


@torch.no_grad()
def sequential_weights(
    blocks: Mapping[str, nn.Module],
    run: Callable[[Tensor], object],
    layers: dict[str, QuantizedLinear],
    groups: Sequence[Sequence[str]],
    method: Method,
    inputs: dict[str, Inputs],
    windows: Sequence[Tensor],
    shift: float,
    *,
    kept: set[str],
) -> dict[str, Tensor]:
    """The values of all weights but those `kept`. `windows` are batches of calibration tokens; `run` is the model of these `blocks`."""
    exact, call = _first_block_inputs(next(iter(blocks.values())), run, windows)
    current, found = list(exact), dict[str, Tensor]()
    for path, block in blocks.items():
        names = [group for group in groups if group[0].startswith(f"{path}.")]
        own = {name: layers[name] for group in names for name in group}
        for layer in own.values():
            layer.restore()
        seen = {group[0]: list[Tensor]() for group in names}
        with _recording({name: own[name] for name in seen}, lambda name, x, seen=seen: seen[name].append(x)):
            exact = [call(block, h) for h in exact]
        quantize_inputs({n: layer for n, layer in own.items() if n not in kept}, method, inputs, shift, reference=False)
        for group in names:
            quantized = [name for name in group if name not in kept]
            if quantized:
                moments, across = _moments(block, own[quantized[0]], seen[group[0]], current, call)
                targets = [_fitted(own[name].exact.weight, moments, across) for name in quantized]
                whole = Whole.of(targets, moments, inputs[group[0]], method.weight, shift)
                found |= dict(zip(quantized, rounded([whole], method.weight)[0], strict=True))
                for name in quantized:
                    own[name].weight = found[name]
        current = [call(block, h) for h in current]
    return found | {name: layers[name].exact.weight.detach() for name in layers if name not in found}


def _first_block_inputs(
    first: nn.Module, run: Callable[[Tensor], object], windows: Sequence[Tensor]
) -> tuple[list[Tensor], Callable[[Any, Tensor], Tensor]]:
    """Hidden states of each batch in front of the first block, and how a block is called on some."""
    hidden: list[Tensor] = []
    others: list[Any] = []
    kwargs: dict[str, Any] = {}

    def hook(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden.append(args[0] if args else given["hidden_states"])
        others[:] = args[1:]
        kwargs.update({name: value for name, value in given.items() if name != "hidden_states"})
        raise _Stop

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    for batch in windows:
        assert batch.shape == windows[0].shape, "batches share their positions"
        try:
            run(batch)
        except _Stop:
            continue
    handle.remove()

    def call(block: Any, h: Tensor) -> Tensor:
        out = block(h, *others, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return hidden, call


def _recording(layers: dict[str, QuantizedLinear], see: Callable[[str, Tensor], None]) -> _Hooks:
    return _Hooks([layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in layers.items()])


class _Hooks:
    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _moments(
    block: Any, layer: QuantizedLinear, exact: Sequence[Tensor], current: Sequence[Tensor], call: Callable[[Any, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """E[y y^T] and E[x y^T] of one group's input."""
    read: list[Tensor] = []
    with _recording({"": layer}, lambda _, x: read.append(x if layer.through is None else layer.through(x))):
        for h in current:
            call(block, h)
    rows = sum(x.shape[0] * x.shape[1] for x in read)
    moments = sum(y.flatten(0, -2).mT @ y.flatten(0, -2) for y in read) / rows
    across = sum(x.flatten(0, -2).mT @ y.flatten(0, -2) for x, y in zip(exact, read, strict=True)) / rows
    return moments, across  # type: ignore[return-value]


def _fitted(weight: Tensor, moments: Tensor, across: Tensor) -> Tensor:
    """W (E[x y^T] + d) (E[y y^T] + d)^-1, d damping."""
    damped = _DAMPING * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)
    solved = torch.linalg.solve((moments + damped).double(), (weight @ (across + damped)).double(), left=False)
    return solved.float()
