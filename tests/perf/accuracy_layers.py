"""Linears whose weight and input went through 4 bits, at a shift of the scale grid, and the statistics that some methods need.

A shift multiplies the largest element that the global scale is made from: every block's scale then rounds anew, which changes nothing that
matters, so results over shifts show what rounding luck is worth. It is an extra row with that one element, dropped afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from accuracy_gptq import gptq_together
from accuracy_methods import OUTLIERS, Method, WeightMethod
from torch import Tensor, nn

from fp4compile.codegen.calibrated import quantize_for_inputs
from fp4compile.codegen.formats import QuantConfig, round_up
from fp4compile.codegen.ops import QUANTIZE, quantize_args
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.residual import quantize_residual_ref

SHIFTS: Final = tuple(2.0 ** (i / 5) for i in range(5))  # an octave of them: e4m3 scales repeat after one
_ARC_THRESHOLD, _ARC_MULTIPLE, _ARC_MOST = 1 / 8, 64, 0.25  # arXiv 2601.07475, and the policies' bound


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of one Linear's input rows (R, K): E[x x^T] and the largest magnitude of each channel."""

    moments: Tensor
    channel_amax: Tensor

    @property
    def order(self) -> Tensor:
        """Channels by their largest magnitude, outliers last."""
        return self.channel_amax.argsort()

    def outliers(self, how: str) -> int:
        """As a policy's `arc = { threshold = 0.125 }`, or `{ fraction = share, most = share }`, chooses."""
        k, share = len(self.channel_amax), OUTLIERS[how]
        above = int((self.channel_amax > _ARC_THRESHOLD * self.channel_amax.max()).sum())
        wanted, most = (above, _ARC_MOST) if share is None else (math.ceil(share * k), share)
        return min(round_up(wanted, _ARC_MULTIPLE), int(most * k) // _ARC_MULTIPLE * _ARC_MULTIPLE)


class QuantizedLinear(nn.Module):
    """A Linear that computes on other values: `weight` (N, K), and `through` applied to its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.exact = linear
        self.weight: Tensor = linear.weight.detach()
        self.through: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self.through is None else self.through(x), self.weight, self.exact.bias)

    def restore(self) -> None:
        self.weight, self.through = self.exact.weight.detach(), None


def install(model: nn.Module, names: Sequence[str]) -> dict[str, QuantizedLinear]:
    """Replace these Linears of `model`."""
    made = {}
    for name in names:
        made[name] = QuantizedLinear(model.get_submodule(name))  # type: ignore[arg-type]
        model.set_submodule(name, made[name])
    return made


def collect(layers: dict[str, QuantizedLinear], run: Callable[[], object]) -> dict[str, Inputs]:
    """`run` calls the model with all calibration inputs."""
    amax: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)

    def add(name: str, x: Tensor) -> None:
        amax[name] = torch.maximum(x.abs().amax(0), amax.get(name, x.new_zeros(())))
        moments[name] = moments[name] + x.mT @ x if name in moments else x.mT @ x
        rows[name] += len(x)

    with _watching(layers, add):
        run()
    return {name: Inputs(moments=moments[name] / rows[name], channel_amax=amax[name]) for name in layers}


@contextmanager
def _watching(layers: dict[str, QuantizedLinear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0].flatten(0, -2))) for name, layer in layers.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def quantized_weights(
    layers: dict[str, QuantizedLinear], groups: Sequence[Sequence[str]], method: WeightMethod, inputs: dict[str, Inputs], shift: float
) -> dict[str, Tensor]:
    """The values of all weights. `groups` are layers that read one input: GPTQ goes through their columns together."""
    wholes = []
    for group in groups:
        own = inputs.get(group[0])
        moments = own.moments if own and method.calibrated else None
        wholes.append(Whole.of([layers[name].exact.weight for name in group], moments, own, method, shift))
    values = rounded(wholes, method)
    return {name: each for group, found in zip(groups, values, strict=True) for name, each in zip(group, found, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Weights (N, K) that read one input, in the order of channels that the method has, with scales chosen."""

    weights: list[Tensor]  # each with the row that shifts its grid
    packed: list[tuple[Tensor, Tensor, Tensor]]
    moments: Tensor | None
    back: Tensor | None

    @classmethod
    def of(cls, weights: list[Tensor], moments: Tensor | None, inputs: Inputs | None, method: WeightMethod, shift: float) -> Whole:
        order = None
        if method.ordered:
            assert inputs is not None
            order = inputs.order
            weights, moments = [w[:, order] for w in weights], None if moments is None else moments[order][:, order]
        weights = [_shifted(w, shift) for w in weights]
        if "local_hessian" in method.calibrated:
            assert moments is not None
            found = [quantize_for_inputs(w, moments, method.config, method="local_hessian") for w in weights]
            packed = [(q.codes, q.scales, q.global_scale) for q in found]
        else:
            packed = [QUANTIZE(w, -1, *quantize_args(method.config), None) for w in weights]
        return cls(weights=weights, packed=packed, moments=moments, back=None if order is None else order.argsort())

    def parts(self, values: Tensor) -> list[Tensor]:
        """Of all rows together, each weight's, channels in their own order."""
        found = [part[:-1] for part in values.split([len(w) for w in self.weights])]
        return found if self.back is None else [part[:, self.back] for part in found]

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.weights)

    @property
    def scales(self) -> Tensor:
        return torch.cat([p[1].view(torch.uint8) for p in self.packed])

    @property
    def decode(self) -> Tensor:
        return torch.cat([p[2].expand(len(p[0])) for p in self.packed])


def rounded(wholes: Sequence[Whole], method: WeightMethod) -> list[list[Tensor]]:
    """Values of the weights of each; by GPTQ those of equal shapes together."""
    if "gptq" not in method.calibrated:
        return [whole.parts(torch.cat([dequantize_ref(*p) for p in whole.packed])) for whole in wholes]
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, whole in enumerate(wholes):
        alike.setdefault((*whole.rows.shape, len(whole.weights)), []).append(i)
    found: dict[int, list[Tensor]] = {}
    for own in alike.values():
        stacked = [torch.stack([getattr(wholes[i], what) for i in own]) for what in ("rows", "moments", "scales", "decode")]
        for i, values in zip(own, gptq_together(*stacked, method.config), strict=True):
            found[i] = wholes[i].parts(values)
    return [found[i] for i in range(len(wholes))]


def quantize_inputs(
    layers: dict[str, QuantizedLinear], method: Method, inputs: dict[str, Inputs], shift: float, *, reference: bool
) -> None:
    """Set what each layer does with its input."""
    for name, layer in layers.items():
        if method.activation is None:
            layer.through = None
        elif method.outliers:
            own = inputs[name]
            layer.through = _with_residual(own.order.int(), own.outliers(method.outliers), method.activation, shift)
        else:
            layer.through = _plainly(method.activation, shift, reference)


def _plainly(config: QuantConfig, shift: float, reference: bool) -> Callable[[Tensor], Tensor]:
    def through(x: Tensor) -> Tensor:
        rows = _shifted(x, shift)
        packed = quantize_ref(rows, config) if reference else QUANTIZE(rows, -1, *quantize_args(config), None)
        return dequantize_ref(*packed)[..., : x.shape[-2], : x.shape[-1]]

    return through


def _with_residual(order: Tensor, outliers: int, config: QuantConfig, shift: float) -> Callable[[Tensor], Tensor]:
    """The sum of each outlier block and its residual block, channels back in their own order."""
    back = order.long().argsort()

    def through(x: Tensor) -> Tensor:
        blocks = dequantize_ref(*quantize_residual_ref(_shifted(x, shift), order, outliers, config)).unflatten(-1, (-1, config.fmt.block))
        plain = blocks.shape[-2] - 2 * outliers // config.fmt.block
        pairs = blocks[..., plain::2, :] + blocks[..., plain + 1 :: 2, :]
        once = torch.cat([blocks[..., :plain, :], pairs], dim=-2).flatten(-2)
        return once.index_select(-1, back)[..., : x.shape[-2], :]

    return through


def _shifted(x: Tensor, shift: float) -> Tensor:
    """`x` (..., R, K), each matrix with one more row that holds `shift` times its largest magnitude and zeros."""
    row = F.pad((x.abs().amax((-2, -1)) * shift)[..., None, None], (0, x.shape[-1] - 1))
    return torch.cat([x, row], dim=-2)


def weight_error(layers: dict[str, QuantizedLinear], weights: dict[str, Tensor]) -> float:
    """100 sum(err^2) / sum(w^2)."""
    lost = sum((weights[name] - layer.exact.weight).square().sum().item() for name, layer in layers.items())
    return 100 * lost / sum(layer.exact.weight.square().sum().item() for layer in layers.values())


def extra_k(layers: dict[str, Any], inputs: dict[str, Inputs], how: str) -> float:
    """By how much residuals make the products longer, as a share of all multiplications."""
    if not how:
        return 0.0
    more = sum(layer.exact.weight.shape[0] * inputs[name].outliers(how) for name, layer in layers.items())
    return more / sum(layer.exact.weight.numel() for layer in layers.values())
