"""The number formats as rows of a table, and the record that says how one operand is quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import torch

from fp4compile.codegen.errors import IllegalCombination, UnknownName

E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX: Final = 6.0
INTEGER_VALUES: Final = tuple(float(v) for v in range(8))
E4M3_MAX: Final = 448.0
FP32_MAX: Final = torch.finfo(torch.float32).max
# MS-EDEN (arXiv 2601.22813): values of one correction; how far block maxima are mapped beyond 6; the largest block scale before it.
EDEN_GROUP: Final = 128
EDEN_WIDEN: Final = 17 / 16 * 0.93
EDEN_E4M3_BOUND: Final = 255.99
RUN: Final = 128  # values of a row that share a global scale where it is neither one a tensor nor one a row


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """A block-scaled 4-bit format: sign and magnitude, one scale per `block` of elements along the contraction dimension.

    Where `flagged_values` are given, a scale byte is an e4m3 magnitude and its sign bit says which of the two tables its block reads.
    The dtype of the scales tells operators how to decode, so such bytes have a dtype of their own and no kernel takes them for e4m3.
    """

    name: str
    block: int
    blocks: tuple[str, ...]  # legal block shapes, the default first
    scale_dtype: torch.dtype
    has_global_scale: bool
    values: tuple[float, ...] = E2M1_VALUES  # magnitudes of the codes 0..7
    flagged_values: tuple[float, ...] = ()  # the same in a block whose scale has its sign bit set
    in_hardware: bool = True  # block-scaled tensor cores multiply it

    @property
    def bits_per_value(self) -> float:
        return 4 + 8 / self.block


NVFP4: Final = BlockFormat(name="nvfp4", block=16, blocks=("1x16", "16x16"), scale_dtype=torch.float8_e4m3fn, has_global_scale=True)
MXFP4: Final = BlockFormat(name="mxfp4", block=32, blocks=("1x32",), scale_dtype=torch.float8_e8m0fnu, has_global_scale=False)
# arXiv 2605.31035: each block is e2m1 or integers. NVINT4 is the same with every block flagged.
MIXFP4: Final = BlockFormat(
    name="mixfp4", block=16, blocks=("1x16",), scale_dtype=torch.uint8, has_global_scale=True,
    flagged_values=INTEGER_VALUES, in_hardware=False,
)  # fmt: skip
NVINT4: Final = replace(MIXFP4, name="nvint4")
# arXiv 2603.28765: integers are decoded times 6/7, so that both kinds of block share one scale. No binary fraction is 6/7: here the global
# scale carries the 1/7, and the elements the rest, so that element times scale is exact in 9 bits (float16, TF32; not bfloat16).
IF4: Final = replace(
    MIXFP4, name="if4", scale_dtype=torch.int8,
    values=tuple(7 * v for v in E2M1_VALUES), flagged_values=tuple(6 * v for v in INTEGER_VALUES),
)  # fmt: skip
FORMATS: Final = {f.name: f for f in (NVFP4, MXFP4, MIXFP4, IF4, NVINT4)}
BLOCK_OF_SCALES: Final = {f.scale_dtype: f.block for f in FORMATS.values()}  # elements that share one scale of this dtype


class Block(StrEnum):
    """Shape of the region that shares one scale, rows x contraction."""

    ROW16 = "1x16"
    TILE16 = "16x16"  # the same codes serve W and its transpose
    ROW32 = "1x32"


class ScaleRule(StrEnum):
    """How a block scale is chosen. `four_over_six*` tries mapping the block maximum to 6 and to 4 (arXiv 2512.02010)."""

    AMAX = "amax"
    AMAX_17_16 = "amax_17_16"  # wider by 17/16, the most that e4m3 rounds a scale down: no value is clipped, so draws are unbiased
    FOUR_OVER_SIX = "four_over_six"  # lower squared error
    FOUR_OVER_SIX_MAE = "four_over_six_mae"
    FOUR_OVER_SIX_ABSMAX = "four_over_six_absmax"
    SWEEP = "sweep"  # least squared error of the e4m3 scales around the usual one
    SOAR = "soar"  # arXiv 2605.12245: global scale and block scales in closed form, in turns
    SOAR_DECOUPLED = "soar_decoupled"  # and then the better neighbour of each block scale
    LOCAL_HESSIAN = "local_hessian"  # a sweep by the error of the layer's output; needs calibration

    @property
    def e4m3_bound(self) -> float:
        """Largest block scale the global scale aims at. 256 leaves room for the 1.5x candidate: 1.5 * 256 <= 448."""
        return E4M3_MAX if self in (ScaleRule.AMAX, ScaleRule.AMAX_17_16) else 256.0

    @property
    def tries_two(self) -> bool:
        return self.startswith("four_over_six")


class GlobalScale(StrEnum):
    """What shares one fp32 scale: each matrix, each row of it, each 128 values of a row, or a calibrated constant."""

    TENSOR = "tensor"
    ROW = "row"
    RUN = "1x128"  # arXiv 2510.27527: see `reference/runs.py`
    STATIC = "static"


class Rounding(StrEnum):
    NEAREST = "nearest"  # ties to the even code
    STOCHASTIC = "stochastic"
    EDEN = "eden"  # nearest, and block scales that undo what it lost on average, rounded stochastically: see `reference/eden.py`
    GPTQ = "gptq"  # column by column, each error handed on to those that follow; needs calibration


class Signs(StrEnum):
    """The signs that a Hadamard rotation multiplies with first. Both operands of a product have the same ones."""

    FIXED = "fixed"  # TransformerEngine's vector, for all layers and steps
    RANDOM = "random"  # drawn for each product in each backward


class Source(StrEnum):
    """Which values of an activation or a weight a backward product quantizes."""

    ORIGINAL = "original"
    FORWARD = "forward"  # those that the forward multiplied with: its codes, decoded


class Layout(StrEnum):
    """Where codes and scales lie in memory: a matter of speed alone, chosen per kernel and never by a policy. See `reference/layout.py`."""

    PLAIN = "plain"
    SWIZZLED = "swizzled"  # scales in the 128x4 blocks of cuBLAS and `tcgen05`, codes plain
    TILED = "tiled"  # codes and scales in tiles of 16 rows and 128 columns, for weight-only products


HADAMARD_SIZES: Final = (0, 16, 32, 64, 128)
_SOAR: Final = (ScaleRule.SOAR, ScaleRule.SOAR_DECOUPLED)
_OFFLINE: Final = (ScaleRule.SWEEP, *_SOAR, ScaleRule.LOCAL_HESSIAN)
# Scale rules that compare by squared error, as the choice between two kinds of block does.
_FLAGGED_RULES: Final = {
    "mixfp4": (ScaleRule.AMAX, ScaleRule.FOUR_OVER_SIX, ScaleRule.SWEEP, ScaleRule.LOCAL_HESSIAN),
    "if4": (ScaleRule.AMAX, ScaleRule.SWEEP, ScaleRule.LOCAL_HESSIAN),
    "nvint4": (ScaleRule.AMAX, ScaleRule.SWEEP, ScaleRule.LOCAL_HESSIAN),
}


_CHOICES: Final = (
    ("block", Block), ("scale_rule", ScaleRule), ("global_scale", GlobalScale), ("rounding", Rounding), ("signs", Signs),
    ("source", Source),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How one operand becomes 4-bit. Plain data: it is a key of the weight store and part of every fingerprint.

    Raises `UnknownName` for a format that does not exist and `IllegalCombination` for settings that exclude each other.
    """

    format: str = "nvfp4"
    block: str = ""  # empty: the format's own, 1x16 or 1x32
    scale_rule: ScaleRule = ScaleRule.AMAX
    global_scale: GlobalScale = GlobalScale.TENSOR
    rounding: Rounding = Rounding.NEAREST
    hadamard: int = 0
    static_amax: float | None = None
    calibration: str = ""  # whose statistics it goes by: a key of `codegen/statistics.py`; empty where it needs none
    signs: Signs = Signs.FIXED  # passes spell random ones as a product before the rotation: operators know the fixed ones only
    source: Source = Source.ORIGINAL  # passes spell the other as a product in front of the operator

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UnknownName(what="format", found=self.format, valid=FORMATS)
        object.__setattr__(self, "block", self.block or self.fmt.blocks[0])
        for field, kind in _CHOICES:
            value = getattr(self, field)
            if value not in list(kind):
                raise UnknownName(what=field, found=str(value), valid=list(kind))
            object.__setattr__(self, field, kind(value))
        if not self.needs_statistics:
            object.__setattr__(self, "calibration", "")
        for found, needed, advice in self._conflicts():
            raise IllegalCombination(where=f"quantize to {self.format}", found=found, needed=needed, advice=advice)

    def _conflicts(self) -> list[tuple[str, str, str]]:
        """(what was found, what is needed, what to do) of every pair of settings that exclude each other."""
        rows = (
            *self._calibration_conflicts(),
            *self._format_conflicts(),
            *self._flagged_conflicts(),
            *self._eden_conflicts(),
            *self._pair_conflicts(),
            *self._soar_conflicts(),
            *self._static_conflicts(),
        )
        return [(found, needed, advice) for holds, found, needed, advice in rows if holds]

    def _format_conflicts(self) -> tuple[tuple[bool, str, str, str], ...]:
        mxfp4, fmt = self.format == "mxfp4", self.fmt
        rule, scale = f"scale_rule = {self.scale_rule}", f"global_scale = {self.global_scale}"
        blocks = f"{fmt.name} has {' or '.join(fmt.blocks)}."
        return (
            (
                self.hadamard not in HADAMARD_SIZES,
                f"hadamard = {self.hadamard}",
                f"One of {HADAMARD_SIZES} is needed.",
                "Use 16, or 0 for none.",
            ),
            (self.block not in fmt.blocks, f"block = {self.block}", blocks, "Use one of those, or another format."),
            (
                mxfp4 and self.scale_rule is not ScaleRule.AMAX,
                rule,
                "MXFP4 scales are powers of two.",
                "Use scale_rule = 'amax', or format = 'nvfp4'.",
            ),
            (mxfp4 and self.global_scale is not GlobalScale.TENSOR, scale, "MXFP4 has no global scale.", "Leave global_scale out."),
            (self.by_runs and self.format != "nvfp4", scale, "Runs have scales in NVFP4 alone.", "Use global_scale = 'tensor'."),
            (
                self.by_runs and self.needs_moments,
                f"{scale} with a calibrated weight",
                "Calibrated methods quantize whole rows.",
                "Use global_scale = 'row'.",
            ),
        )

    def _calibration_conflicts(self) -> tuple[tuple[bool, str, str, str], ...]:
        needed = "It needs a calibration artefact, the second moments of the layer's input."
        advice = (
            "Run `fp4compile calibrate` and name its file in the policy, calibration = 'file.pt'; or use scale_rule = 'sweep', "
            "which needs no data."
        )
        return (
            (self.scale_rule is ScaleRule.LOCAL_HESSIAN and not self.calibration, "scale_rule = local_hessian", needed, advice),
            (self.rounding is Rounding.GPTQ and not self.calibration, "rounding = gptq", needed, advice),
        )

    def _flagged_conflicts(self) -> tuple[tuple[bool, str, str, str], ...]:
        legal = _FLAGGED_RULES.get(self.format, tuple(ScaleRule))
        return (
            (
                self.scale_rule not in legal,
                f"scale_rule = {self.scale_rule}",
                f"{self.format} has {' or '.join(legal)}.",
                "Use one of those, or format = 'nvfp4'.",
            ),
            (
                bool(self.fmt.flagged_values) and self.draws,
                f"rounding = {self.rounding}",
                "Choosing the kind of a block between two random draws is biased.",
                "Use format = 'nvfp4' on the stochastic operand.",
            ),
        )

    def _eden_conflicts(self) -> tuple[tuple[bool, str, str, str], ...]:
        eden, found = self.rounding is Rounding.EDEN, "rounding = eden"
        return (
            (
                eden and self.format == "mxfp4",
                f"{found} with format = mxfp4",
                "It corrects block scales, which a power of two is too coarse for.",
                "Use format = 'nvfp4', or rounding = 'stochastic'.",
            ),
            (
                eden and self.scale_rule is not ScaleRule.AMAX,
                f"{found} with scale_rule = {self.scale_rule}",
                "EDEN maps block maxima as its own correction wants, and a scale chosen by its error is biased.",
                "Leave scale_rule out.",
            ),
            (
                eden and self.is_tile,
                f"{found} with block = 16x16",
                "Its corrections are those of 128 values of one row.",
                "Use block = '1x16'.",
            ),
        )

    def _soar_conflicts(self) -> tuple[tuple[bool, str, str, str], ...]:
        soar, found = self.scale_rule in _SOAR, f"scale_rule = {self.scale_rule}"
        advice = "Use scale_rule = 'sweep'"
        return (
            (soar and self.is_tile, f"{found} with block = 16x16", "Its closed form solves blocks of one row.", f"{advice}."),
            (
                soar and self.global_scale is GlobalScale.STATIC,
                f"{found} with global_scale = static",
                "It chooses the global scale itself.",
                f"{advice}, or global_scale = 'tensor'.",
            ),
        )

    def _pair_conflicts(self) -> tuple[tuple[bool, str, str, str], ...]:
        stochastic = self.rounding is Rounding.STOCHASTIC
        return (
            (
                self.scale_rule not in (ScaleRule.AMAX, ScaleRule.AMAX_17_16) and stochastic,
                f"scale_rule = {self.scale_rule} with rounding = stochastic",
                "Choosing between two random draws is biased.",
                "Use scale_rule = 'amax' or 'amax_17_16' on the stochastic operand.",
            ),
            (
                self.scale_rule is ScaleRule.AMAX_17_16 and not stochastic,
                f"scale_rule = {self.scale_rule} with rounding = {self.rounding}",
                "The wider scale only serves to make stochastic rounding unbiased; nearest rounding loses by it.",
                "Use rounding = 'stochastic', or scale_rule = 'amax'.",
            ),
            (
                self.signs is Signs.RANDOM and not self.hadamard,
                "signs = random without hadamard",
                "The signs belong to a rotation.",
                "Give hadamard = 16, or leave signs out.",
            ),
            (
                self.is_tile and self.hadamard != 0,
                "block = 16x16 with hadamard",
                "A rotation breaks the codes that W and its transpose share.",
                "Use block = '1x16', or hadamard = 0.",
            ),
            (
                self.is_tile and self.global_scale in (GlobalScale.ROW, GlobalScale.RUN),
                f"block = 16x16 with global_scale = {self.global_scale}",
                "A 16x16 block spans rows.",
                "Use global_scale = 'tensor'.",
            ),
        )

    def _static_conflicts(self) -> tuple[tuple[bool, str, str, str], ...]:
        amax = self.static_amax
        found = f"global_scale = {self.global_scale} with static_amax = {amax}"
        lonely = (self.global_scale is GlobalScale.STATIC) != (amax is not None) and not self.calibration
        unusable = amax is not None and not 0 < amax < FP32_MAX
        return (
            (
                lonely,
                found,
                "A static scale and its calibrated amax come together.",
                "Give both or neither; in a policy calibration = 'file.pt' gives the amax of activations.",
            ),
            (unusable, f"static_amax = {amax}", "It must be positive and finite.", "Calibrate again."),
        )

    @property
    def is_offline(self) -> bool:
        """Whether it is computed in plain PyTorch, once a weight: such a search has no kernel and is too slow for activations."""
        return self.scale_rule in _OFFLINE or self.rounding is Rounding.GPTQ or bool(self.fmt.flagged_values)

    @property
    def needs_moments(self) -> bool:
        """Whether it is chosen by the error of the layer's output, which takes the second moments of the layer's input."""
        return self.scale_rule is ScaleRule.LOCAL_HESSIAN or self.rounding is Rounding.GPTQ

    @property
    def needs_statistics(self) -> bool:
        """Whether it takes anything from a calibration."""
        return self.needs_moments or (self.global_scale is GlobalScale.STATIC and self.static_amax is None)

    @property
    def fmt(self) -> BlockFormat:
        return FORMATS[self.format]

    @property
    def is_tile(self) -> bool:
        return self.block == Block.TILE16

    @property
    def by_runs(self) -> bool:
        return self.global_scale is GlobalScale.RUN

    @property
    def draws(self) -> bool:
        """Whether it takes random numbers, and so a seed."""
        return self.rounding in (Rounding.STOCHASTIC, Rounding.EDEN)

    @property
    def k_multiple(self) -> int:
        """The contraction length is zero-padded to a multiple of this, inside the operator."""
        return max(self.fmt.block, self.hadamard, EDEN_GROUP if self.rounding is Rounding.EDEN else 0, RUN if self.by_runs else 0)

    @property
    def encode_bound(self) -> float:
        """What the global scale maps the largest magnitude to: an element's bound times that of a block scale."""
        return E2M1_MAX / EDEN_WIDEN * EDEN_E4M3_BOUND if self.rounding is Rounding.EDEN else E2M1_MAX * self.scale_rule.e4m3_bound

    def describe(self) -> str:
        """Short text for reports: what differs from plain nearest rounding."""
        extras = [
            self.format,
            "16x16" if self.is_tile else "",
            "" if self.scale_rule is ScaleRule.AMAX else str(self.scale_rule),
            "" if self.global_scale is GlobalScale.TENSOR else str(self.global_scale),
            {Rounding.STOCHASTIC: "sr", Rounding.EDEN: "eden"}.get(self.rounding, ""),
            f"h{self.hadamard}" if self.hadamard else "",
            "gptq" if self.rounding is Rounding.GPTQ else "",
            "random signs" if self.signs is Signs.RANDOM else "",
            "of the forward's" if self.source is Source.FORWARD else "",
        ]
        return "+".join(e for e in extras if e)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple that is at least `value`; works on SymInt too."""
    return (value + multiple - 1) // multiple * multiple
