"""What is measured, as data: one value a row of the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Final

from fp4compile.codegen.formats import GlobalScale, QuantConfig

ACTIVATIONS: Final = ("bf16", "fp4")
PHASES: Final = ("decode", "prefill")
MODES: Final = ("default", "reduce-overhead")  # of torch.compile
Shape = tuple[int, int]  # N x K of a weight, rows x columns of a tensor to quantize


@dataclass(frozen=True, kw_only=True)
class MatmulCase:
    """x (m, k) bfloat16 times a `format` weight (n, k) transposed; with activation "fp4" x is quantized first, which counts.

    With `groups` there are so many weights, and the rows of x are split among them unevenly, as tokens among experts.
    """

    n: int
    k: int
    m: int
    format: str = "nvfp4"
    activation: str = "bf16"
    groups: int = 0

    @property
    def kind(self) -> str:
        return "grouped" if self.groups else "matmul"

    @property
    def key(self) -> str:
        return f"{self.kind} {self.weight} m={self.m} {self.scheme}".replace(" x ", "x")

    @property
    def weight(self) -> str:
        return f"{self.groups} of {self.n} x {self.k}" if self.groups else f"{self.n} x {self.k}"

    @property
    def values(self) -> int:
        """Of all weights."""
        return self.n * self.k * max(self.groups, 1)

    @property
    def scheme(self) -> str:
        return f"{self.format} {'W4A16' if self.activation == 'bf16' else 'W4A4'}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class QuantizeCase:
    """A bfloat16 tensor (rows, columns) quantized along `axis` as `options` of `QuantConfig` say.

    axis None: along both in one reading, as training wants it, with `column_options` for the copy along the columns.
    """

    kind: ClassVar[str] = "quantize"
    rows: int
    columns: int
    axis: int | None = -1
    options: dict[str, Any] = field(default_factory=dict)
    column_options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> QuantConfig:
        return QuantConfig(**self.options)

    @property
    def column_config(self) -> QuantConfig:
        return QuantConfig(**self.column_options)

    @property
    def configs(self) -> tuple[QuantConfig, ...]:
        """One a copy that is written."""
        return (self.config,) if self.axis is not None else (self.config, self.column_config)

    @property
    def key(self) -> str:
        return f"quantize {self.rows}x{self.columns} {self.scheme}"

    @property
    def scheme(self) -> str:
        if self.axis is None:
            return f"{_words(self.config)} and columns {_words(self.column_config)}"
        return f"{_words(self.config)}{' columns' if self.axis == -2 else ''}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _words(config: QuantConfig) -> str:
    shared = config.fmt.has_global_scale and config.global_scale is GlobalScale.TENSOR
    return f"{config.describe()}{' tensor' if shared else ''}"


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """`layers` decoder layers of a Llama, `tokens` new positions after `context` old ones, compiled with `policy` in `mode`."""

    kind: ClassVar[str] = "layer"
    model: str
    phase: str  # "decode" or "prefill"
    policy: str
    mode: str
    tokens: int
    context: int
    layers: int

    @property
    def key(self) -> str:
        return f"layer {self.model} x{self.layers} {self.phase} {self.tokens} after {self.context} {self.policy} {self.mode}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Case = MatmulCase | QuantizeCase | LayerCase

_TRAINING: Final = {"rounding": "stochastic", "hadamard": 16}
_QUANTIZATIONS: Final[tuple[tuple[int | None, dict[str, Any], dict[str, Any]], ...]] = (
    (-1, {}, {}),
    (-1, {"global_scale": "row"}, {}),
    (-1, {"global_scale": "static", "static_amax": 4.0}, {}),
    (-2, {}, {}),
    (-1, {"block": "16x16"}, {}),
    (-1, {"hadamard": 16}, {}),
    (-1, {"hadamard": 16, "global_scale": "row"}, {}),
    (-1, {"scale_rule": "four_over_six"}, {}),
    (-1, {"scale_rule": "four_over_six", "global_scale": "row"}, {}),
    (-1, {"rounding": "stochastic"}, {}),
    (-2, _TRAINING, {}),
    (None, {}, {}),
    (None, {"rounding": "stochastic"}, _TRAINING),
    (-1, {"format": "mxfp4"}, {}),
)


def matmul_cases(
    shapes: Sequence[Shape], rows: Sequence[int], formats: Sequence[str], activations: Sequence[str], groups: int = 0
) -> list[MatmulCase]:
    return [
        MatmulCase(n=n, k=k, m=m, format=format, activation=activation, groups=groups)
        for n, k in shapes
        for format in formats
        for activation in activations
        for m in rows
    ]


def quantize_cases(shapes: Sequence[Shape], formats: Sequence[str]) -> list[QuantizeCase]:
    every = [
        QuantizeCase(rows=r, columns=c, axis=axis, options=options, column_options=column_options)
        for r, c in shapes
        for axis, options, column_options in _QUANTIZATIONS
    ]
    return [case for case in every if case.config.format in formats]


def layer_cases(
    model: str, policies: Sequence[str], modes: Sequence[str], phases: Sequence[str], prefill: int, context: int, layers: int
) -> list[LayerCase]:
    """The baseline, policy "bf16", comes first of each phase and mode: what follows is compared with it."""
    return [
        LayerCase(model=model, phase=phase, policy=policy, mode=mode, tokens=tokens, context=old, layers=layers)
        for phase, tokens, old in (("decode", 1, context), ("prefill", prefill, 0))
        if phase in phases
        for mode in modes
        for policy in ("bf16", *policies)
    ]
