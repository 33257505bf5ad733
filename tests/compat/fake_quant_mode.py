"""What a compiled model must equal: the model run eagerly, with every matmul's operands fake-quantized as it is dispatched.

Nothing here looks at a graph. A tensor is a weight when it was computed from parameters and fixed buffers alone, which the mode follows
by storage while the model runs; a product is in the backward when autograd's engine is running.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from tests.fp4compile.eager_recipe import Recipe

aten = torch.ops.aten
# Every operator that multiplies matrices, by schema name, with the places of its factors. One that is missing here is missed twice.
PRODUCTS = {
    "mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "_grouped_mm": (0, 1), "mv": (0, 1), "addmv": (1, 2), "addbmm": (1, 2),
    "dot": (0, 1), "linear": (0, 1), "convolution": (0, 1), "_trilinear": (0, 1), "_int_mm": (0, 1), "_scaled_mm": (0, 1),
    "_addmm_activation": (1, 2), "mkldnn_linear": (0, 1), "mkldnn_rnn_layer": (0, 1), "lstm": (0, 1), "grouped_mm_fallback": (0, 1),
    "_scaled_dot_product_flash_attention_for_cpu": (0, 1), "_scaled_dot_product_attention_math": (0, 1),
}  # fmt: skip
_QUANTIZED = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
_LOOK_UPS = ("embedding", "index", "gather", "index_select")  # a position's embedding is an activation, though no input is in it
_VALUES_DO_NOT_MATTER = ("_like", "new_", "sym_")  # ones_like(weight) is no weight
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Shape = tuple[frozenset[int], int]
Configs = tuple[QuantConfig | None, QuantConfig | None]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One product as it was dispatched; sizes of matmuls only, `m` over all batches."""

    op: str
    backward: bool
    is_layer: bool  # a weight meets something that is none
    m: int = 0
    n: int = 0
    k: int = 0


class FakeQuant(TorchDispatchMode):
    """Run the products of layers in `recipe` and keep a list of all products; without a recipe, only keep the list.

    Forward: products of a weight with what depends on inputs, and convolutions with one whose kernel tiles the input. Backward: those
    whose sizes tell dgrad or wgrad of such a layer.
    """

    def __init__(self, model: torch.nn.Module | Iterable[Tensor], recipe: Recipe | None = None) -> None:
        super().__init__()
        is_module = isinstance(model, torch.nn.Module)
        self.recipe = recipe
        self.calls: list[Call] = []
        # Holding the tensors keeps their storages' addresses from being reused.
        self.weights = {_storage(p): p for p in (model.parameters() if is_module else model)}
        self.fixed = {_storage(b): b for b in (model.buffers() if is_module else ())}  # buffers until written to, literals
        self.layers: set[Shape] = set()  # sizes of the weight; what it does not share with the other operand

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [self._is_weight(t) or _storage(t) in self.fixed for t in inputs]
        is_weight = all(known) and any(map(self._is_weight, inputs)) and name not in _LOOK_UPS
        out = self._product(func, name, args, kwargs, is_weight) if name in PRODUCTS else func(*args, **kwargs)
        results = {_storage(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        if func._schema.is_mutable:
            self.fixed = {k: t for k, t in self.fixed.items() if k not in results}
        elif is_weight and not any(part in name for part in _VALUES_DO_NOT_MATTER):
            self.weights.update(results)
        elif all(known):
            self.fixed.update(results)
        return out

    def _product(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], is_weight: bool) -> Tensor:
        a, b = (args[i] for i in PRODUCTS[name])
        weights = (self._is_weight(a), self._is_weight(b))
        call, shape = _described(name, a, b, weights, is_weight, self.layers)
        self.calls.append(call)
        if call.is_layer and not call.backward:
            self.layers.add(shape)
        configs = self._configs(call, weights)
        if configs == (None, None) or a.dtype not in _FLOATS or not a.numel() or not b.numel():
            return func(*args, **kwargs)
        if name == "convolution":
            return _convolved(args, configs) if _tiles(args) else func(*args, **kwargs)
        if name == "_grouped_mm":
            return _grouped(a, b, args[2] if len(args) > 2 else kwargs["offs"], configs)
        out = _values(a, configs[0], -1) @ _values(b, configs[1], -2).mT
        if name in ("addmm", "baddbmm"):
            out = kwargs.get("alpha", 1) * out + kwargs.get("beta", 1) * args[0].float()
        return out.to(a.dtype)

    def _configs(self, call: Call, weights: tuple[bool, bool]) -> Configs:
        r = self.recipe
        if r is None or not call.is_layer or call.op not in (*_QUANTIZED, "convolution"):
            return None, None
        if any(weights):
            of_weight, other = (r.dgrad_w, r.dgrad_dy) if call.backward else (r.fprop_w, r.fprop_x)
            return (of_weight if weights[0] else other, of_weight if weights[1] else other)
        return (r.wgrad_x, r.wgrad_dy) if call.op == "mm" else (None, None)

    def _is_weight(self, t: Any) -> bool:
        return isinstance(t, Tensor) and _storage(t) in self.weights


def _described(name: str, a: Tensor, b: Tensor, weights: tuple[bool, bool], is_weight: bool, layers: set[Shape]) -> tuple[Call, Shape]:
    backward = torch._C._current_graph_task_id() != -1
    if name not in _QUANTIZED:
        return Call(op=name, backward=backward, is_layer=any(weights) and not is_weight and not backward), (frozenset(), 0)
    m, n, k = (a.shape[0] if a.ndim == 3 else 1) * a.shape[-2], b.shape[-1], a.shape[-1]
    if any(weights):
        shape = (frozenset((m, k)), n) if weights[0] else (frozenset((n, k)), m)
    else:
        shape = (frozenset((m, n)), k)  # as wgrad has it: the result is as large as the weight, the sum runs over tokens
    is_layer = shape in layers if backward else any(weights) and not is_weight
    return Call(op=name, backward=backward, is_layer=is_layer, m=m, n=n, k=k), shape


def _values(t: Tensor, config: QuantConfig | None, axis: int) -> Tensor:
    """(..., R, K) float32 values of `t`, contraction dimension last; rotated ones reach into the padding."""
    turned = t if axis == -1 else t.mT
    if config is None:
        return turned.float()
    values = dequantize_ref(*quantize_ref(turned, config))
    return values if config.hadamard else values[..., : turned.shape[-1]]


def _grouped(a: Tensor, b: Tensor, offsets: Tensor, configs: Configs) -> Tensor:
    """Rows up to offsets[g] of A (T, K) meet B[g] (K, N)."""
    left, right = _values(a, configs[0], -1), _values(b, configs[1], -2)
    rows = torch.tensor_split(left, offsets[:-1].tolist())
    return torch.cat([part @ right[g].mT for g, part in enumerate(rows)]).to(a.dtype)


def _tiles(args: tuple[Any, ...]) -> bool:
    x, w, _, stride, padding, dilation, transposed, _, groups = args
    kernel = list(w.shape[2:])
    exact = all(s % k == 0 for s, k in zip(x.shape[2:], kernel, strict=True))
    return list(stride) == kernel and not any(padding) and set(dilation) == {1} and not transposed and groups == 1 and exact


def _convolved(args: tuple[Any, ...], configs: Configs) -> Tensor:
    """(B, N, H, W) from patches that do not overlap, through torch's own unfold."""
    x, w, bias = args[:3]
    image, kernel = (x, w.shape[2:]) if x.ndim == 4 else (x[:, :, None], (1, w.shape[2]))
    patches = F.unfold(image.float(), kernel, stride=kernel).mT  # (B, H W, C k k)
    out = _values(patches.flatten(0, 1).to(x.dtype), configs[0], -1) @ _values(w.flatten(1), configs[1], -1).mT
    out = out if bias is None else out + bias.float()
    spatial = [s // k for s, k in zip(x.shape[2:], w.shape[2:], strict=True)]
    return out.view(x.shape[0], *spatial, -1).movedim(-1, 1).contiguous().to(x.dtype)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
