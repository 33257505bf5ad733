"""One colour a precision, the same in pictures and DOT files. Chosen to stay apart for colour-blind readers and in print on white."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fp4compile.report.boxes import Box, Kind


@dataclass(frozen=True)
class Paint:
    """Fill, outline, and the words of the legend."""

    fill: str
    line: str
    label: str


W4A4: Final = Paint("#cdeab6", "#4d8a1f", "matmul, 4-bit x 4-bit")
W4A16: Final = Paint("#bfe5f2", "#1d7896", "matmul, 4-bit weight")
HIGH: Final = Paint("#e4e2f3", "#6a63a8", "matmul in high precision")
FELL_BACK: Final = Paint("#fbd5d0", "#c0392b", "fell back to high precision")
QUANTIZE: Final = Paint("#ffdfad", "#c47a00", "quantize to 4 bits")
ROTATE: Final = Paint("#f6d5ea", "#a8467f", "Hadamard rotation")
STORED: Final = Paint("#fff6bf", "#b59b00", "4-bit weight, kept in the weight store")
WEIGHT: Final = Paint("#ffffff", "#9a9a9a", "weight in high precision")
OTHER: Final = Paint("#f2f2f2", "#9a9a9a", "other operators, compiled by Inductor")
END: Final = Paint("#ffffff", "#333333", "input or output")
SAVED: Final = Paint("#ffffff", "#9a9a9a", "saved by the forward")
EDGE: Final = "#8a8a8a"
EDGE_4BIT: Final = "#d98600"


def paint_of(box: Box) -> Paint:
    if box.kind is Kind.MATMUL:
        if box.fell_back:
            return FELL_BACK
        return W4A4 if "W4A4" in box.precision else W4A16 if "W4A16" in box.precision else HIGH
    return {Kind.QUANTIZE: QUANTIZE, Kind.ROTATE: ROTATE, Kind.OTHER: OTHER, Kind.SAVED: SAVED}.get(box.kind, END)


def carries_four_bits(source: Box) -> bool:
    """Whether what leaves a box is codes and scales."""
    return source.kind is Kind.QUANTIZE or (source.kind is Kind.SAVED and source.title.startswith("quantize"))
