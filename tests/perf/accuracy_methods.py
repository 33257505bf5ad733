"""The rows of the accuracy tables: how weights and activations go through 4 bits, and what of that needs data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from fp4compile.codegen.formats import QuantConfig

PLAIN, FOUR_OVER_SIX, SWEEP = QuantConfig(), QuantConfig(scale_rule="four_over_six"), QuantConfig(scale_rule="sweep")
SOAR, DECOUPLED = QuantConfig(scale_rule="soar"), QuantConfig(scale_rule="soar_decoupled")
MIXFP4, MIXED_SWEEP = QuantConfig(format="mixfp4"), QuantConfig(format="mixfp4", scale_rule="sweep")
IF4, MXFP4 = QuantConfig(format="if4"), QuantConfig(format="mxfp4")
OUTLIERS: Final = {"": 0.0, "threshold": None, "quarter": 1 / 4, "half": 1 / 2}  # share of K that ARC gives a residual; None: as published


@dataclass(frozen=True, kw_only=True)
class WeightMethod:
    """`calibrated` names a method of `quantize_for_inputs`; without it the config decides. `ordered`: columns in ARC's order.

    data: what calibration reads, "text" or "random", tokens drawn evenly from the vocabulary. sequential: block by block, each fitted to
    the inputs that the blocks before it give when they are quantized.
    """

    config: QuantConfig
    calibrated: str = ""
    ordered: bool = False
    data: str = "text"
    sequential: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row. `keep` is the share of FLOPs that stays in high precision, chosen by sensitivity; `high` are roles that do."""

    name: str
    weight: WeightMethod
    activation: QuantConfig | None = None
    outliers: str = ""
    keep: float = 0.0
    high: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Whether it was calibrated, or chosen, on text."""
        return bool(self.keep) or (self.weight.data == "text" and bool(self.weight.calibrated or self.outliers))

    @property
    def scheme(self) -> str:
        return "W4A16" if self.activation is None else "W4A4"


def _row(
    name: str,
    weight: QuantConfig,
    activation: QuantConfig | None = None,
    calibrated: str = "",
    outliers: str = "",
    data: str = "text",
    high: tuple[str, ...] = (),
    sequential: bool = False,
) -> Method:
    method = WeightMethod(config=weight, calibrated=calibrated, ordered=bool(outliers), data=data, sequential=sequential)
    scheme = "W4A16" if activation is None else "W4A4"
    return Method(name=f"{scheme} {name}", weight=method, activation=activation, outliers=outliers, high=high)


BOTH: Final = "gptq_local_hessian"
W4A16: Final = (
    _row("nvfp4", PLAIN),
    _row("mxfp4", MXFP4),
    _row("4/6", FOUR_OVER_SIX),
    _row("sweep", SWEEP),
    _row("SOAR", SOAR),
    _row("SOAR decoupled", DECOUPLED),
    _row("MixFP4", MIXFP4),
    _row("MixFP4 sweep", MIXED_SWEEP),
    _row("IF4", IF4),
    _row("local Hessian", SWEEP, calibrated="local_hessian"),
    _row("GPTQ", SWEEP, calibrated="gptq"),
    _row("GPTQ + local Hessian", SWEEP, calibrated=BOTH),
    _row("MixFP4, GPTQ + local Hessian", MIXED_SWEEP, calibrated=BOTH),
)
W4A4: Final = (
    _row("nvfp4", PLAIN, PLAIN),
    _row("mxfp4", MXFP4, MXFP4),
    _row("4/6", FOUR_OVER_SIX, FOUR_OVER_SIX),
    _row("sweep, activations 4/6", SWEEP, FOUR_OVER_SIX),
    _row("sweep, activations 4/6, v high", SWEEP, FOUR_OVER_SIX, high=("v_proj",)),
    _row("sweep, activations 4/6, k and v high", SWEEP, FOUR_OVER_SIX, high=("k_proj", "v_proj")),
    _row("SOAR, activations 4/6", SOAR, FOUR_OVER_SIX),
    _row("MixFP4, activations 4/6", MIXFP4, FOUR_OVER_SIX),
    _row("MixFP4 sweep, activations 4/6", MIXED_SWEEP, FOUR_OVER_SIX),
    _row("IF4, activations 4/6", IF4, FOUR_OVER_SIX),
    _row("local Hessian, activations 4/6", SWEEP, FOUR_OVER_SIX, calibrated="local_hessian"),
    _row("GPTQ + local Hessian, activations 4/6", SWEEP, FOUR_OVER_SIX, calibrated=BOTH),
    _row("GPTQ + local Hessian of random tokens, activations 4/6", SWEEP, FOUR_OVER_SIX, calibrated=BOTH, data="random"),
    _row(
        "ARC + 4/6, a quarter, GPTQ + local Hessian of random tokens",
        SWEEP,
        FOUR_OVER_SIX,
        calibrated=BOTH,
        outliers="quarter",
        data="random",
    ),
    _row("ARC", PLAIN, PLAIN, outliers="threshold"),
    _row("ARC + 4/6", FOUR_OVER_SIX, FOUR_OVER_SIX, outliers="threshold"),
    _row("ARC + 4/6, a quarter", FOUR_OVER_SIX, FOUR_OVER_SIX, outliers="quarter"),
    _row("ARC + 4/6, local Hessian", SWEEP, FOUR_OVER_SIX, calibrated="local_hessian", outliers="threshold"),
    _row("ARC + 4/6, GPTQ + local Hessian", SWEEP, FOUR_OVER_SIX, calibrated=BOTH, outliers="threshold"),
    _row("ARC + 4/6, a quarter, GPTQ + local Hessian", SWEEP, FOUR_OVER_SIX, calibrated=BOTH, outliers="quarter"),
    _row("ARC + 4/6, half, GPTQ + local Hessian", SWEEP, FOUR_OVER_SIX, calibrated=BOTH, outliers="half"),
    _row("sequential GPTQ + local Hessian, activations 4/6", SWEEP, FOUR_OVER_SIX, calibrated=BOTH, sequential=True),
    _row(
        "ARC + 4/6, a quarter, sequential GPTQ + local Hessian", SWEEP, FOUR_OVER_SIX, calibrated=BOTH, outliers="quarter", sequential=True
    ),
)
KEPT: Final = tuple(
    replace(method, name=f"{method.name}, {share:.0%} in high precision", keep=share)
    for share in (0.15,)
    for method in W4A4
    if method.name.removeprefix("W4A4 ") in (
        "nvfp4", "sweep, activations 4/6", "GPTQ + local Hessian, activations 4/6", "ARC + 4/6, GPTQ + local Hessian",
        "ARC + 4/6, a quarter, GPTQ + local Hessian", "ARC + 4/6, a quarter, sequential GPTQ + local Hessian",
    )
)  # fmt: skip
ROWS: Final = (*W4A4, *W4A16, *KEPT)
BASELINE: Final = "W4A4 nvfp4"  # whose loss the others win back
