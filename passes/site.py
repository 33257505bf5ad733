"""A site is one matmul of the graph, and a plan is what will be done with it. Both ride in `node.meta`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch
from torch import fx

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.outliers import Outliers

Size = int | torch.SymInt
EMPTY: Final = "a dimension is zero"
NO_DEPTH: Final = -1

_SITE, _PLAN, _INPUT, _BUFFER, _CONSTANT, _KERNEL = "fp4_site", "fp4_plan", "fp4_input", "fp4_buffer", "fp4_constant", "fp4_kernel"
_CODES, _ORDER = "fp4_codes", "fp4_order"


class Role(StrEnum):
    """Which of the matmuls of a layer this is. `matmul` multiplies two activations and has no weight."""

    FPROP = "fprop"
    DGRAD = "dgrad"
    WGRAD = "wgrad"
    MATMUL = "matmul"


class OperandKind(StrEnum):
    ACTIVATION = "activation"
    WEIGHT = "weight"
    GRADIENT = "gradient"


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One side of a matmul. `source` is the node to quantize, along `axis` (-1 or -2 of its last two dimensions)."""

    kind: OperandKind
    source: fx.Node
    axis: int
    parameter: str = ""  # fully qualified name, for weights


@dataclass(frozen=True, kw_only=True)
class Site:
    """One matmul: C (M, N) = A (M, K) times B (K, N), batched over `batch` matrices."""

    name: str  # unique in its graph: module path, and a suffix where a module has several matmuls in this role
    module: str  # module path without the root, as in `model.layers.0.mlp.up_proj`; "" for the root module
    class_name: str  # class of the innermost module, as in `Linear`
    role: Role
    op: str  # aten name: mm, addmm, bmm, baddbmm, _grouped_mm, convolution, ...
    m: Size
    n: Size
    k: Size
    batch: Size = 1
    dtype: torch.dtype
    depth: int  # position of the layer among the graph's layers, from 0; NO_DEPTH for heads and routers
    layers: int  # how many layers the graph has
    lhs: Operand | None = None  # None where the site is never rewritten
    rhs: Operand | None = None
    traits: frozenset[str] = frozenset()  # graph facts: "tied", "router", "head", "attention"
    refusal: str = ""  # why no policy can quantize this site; empty where one may

    @property
    def is_empty(self) -> bool:
        """Nothing to compute, as in a batch of no rows."""
        return self.refusal == EMPTY

    @property
    def flops(self) -> Size:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The policy's answer for a site: how each operand is quantized, which rule said so and why.

    An operand left out of `configs` keeps its precision; with no configs at all the site is left alone.
    """

    configs: dict[OperandKind, QuantConfig]
    rule: str  # "preset nvfp4, rule 2", "policy.toml, rule 1"
    reason: str  # a sentence fragment for the report: "output head", "down_proj kept safer"
    dequantized: bool = False  # a backward matmul in high precision, on what the forward's codes decode to
    outliers: Outliers | None = None  # channels of the activation that are quantized twice
    sorts_channels: bool = False  # outliers are sorted one by one, so blocks are made of other channels; known before they are


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A decision that holds for this site: the configs of its two operands. Both None: the site stays as it is."""

    lhs: QuantConfig | None
    rhs: QuantConfig | None
    rule: str
    reason: str
    dequantized: bool = False
    outliers: Outliers | None = None
    sorts_channels: bool = False

    @property
    def quantizes(self) -> bool:
        return self.lhs is not None or self.rhs is not None

    @property
    def precision(self) -> str:
        """Report spelling: `bf16`-like when untouched, else as in `nvfp4 W4A4` or `nvfp4 W4A16`."""
        if not self.quantizes:
            return "high"
        both = self.lhs is not None and self.rhs is not None
        config = self.rhs or self.lhs
        assert config is not None
        return f"{config.format} {'W4A4' if both else 'W4A16'}"


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Marks a node computed from parameters alone: the weight store holds its value and the compiled graph reads it as an input."""

    parameters: tuple[int, ...]  # positions among the graph's flat inputs


@dataclass(frozen=True, kw_only=True)
class CodesOf:
    """Marks a result of a quantize node. `values` names the nodes that hold the same values in high precision, `source` one of them."""

    source: str
    values: frozenset[str]
    size: Size  # bytes of the source


def site_of(node: fx.Node) -> Site | None:
    return node.meta.get(_SITE)


def plan_of(node: fx.Node) -> Plan | None:
    return node.meta.get(_PLAN)


def input_of(node: fx.Node) -> int | None:
    """Position of a placeholder among the flat inputs that Dynamo gave, or None."""
    return node.meta.get(_INPUT)


def is_buffer(node: fx.Node) -> bool:
    """Whether a placeholder is a module's buffer."""
    return node.meta.get(_BUFFER, False)


def constant_of(node: fx.Node) -> Constant | None:
    return node.meta.get(_CONSTANT)


def kernel_of(node: fx.Node) -> str | None:
    return node.meta.get(_KERNEL)


def codes_of(node: fx.Node) -> CodesOf | None:
    return node.meta.get(_CODES)


def is_order(node: fx.Node) -> bool:
    """Whether a node reads an order of channels, an attribute of the graph's module whose name says its content."""
    return node.meta.get(_ORDER, False)


def set_order(node: fx.Node) -> None:
    node.meta[_ORDER] = True


def set_codes_of(node: fx.Node, codes: CodesOf) -> None:
    node.meta[_CODES] = codes


def set_site(node: fx.Node, site: Site) -> None:
    node.meta[_SITE] = site


def set_plan(node: fx.Node, plan: Plan) -> None:
    node.meta[_PLAN] = plan


def set_input(node: fx.Node, position: int, *, buffer: bool = False) -> None:
    node.meta[_INPUT], node.meta[_BUFFER] = position, buffer


def set_constant(node: fx.Node, constant: Constant) -> None:
    node.meta[_CONSTANT] = constant


def set_kernel(node: fx.Node, kernel: str) -> None:
    node.meta[_KERNEL] = kernel


def fake_of(node: fx.Node) -> Any:
    """The fake value of a node: a FakeTensor, a SymInt, or a tuple of them."""
    return node.meta["val"]


def is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")
