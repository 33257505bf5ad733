"""The loop over rows and shifts. Every cell is stored when it is known, so that a run may be cut off anywhere and started again."""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy_layers import SHIFTS, Inputs, QuantizedLinear, extra_k, quantize_inputs, quantized_weights, weight_error
from accuracy_methods import Method, WeightMethod
from torch import Tensor

Scores = dict[str, dict[str, list[float]]]  # text -> measure -> one number a window


class Results:
    """One JSON file, and a copy of it in a second folder. Refuses a file that was made under other settings.

    device: name of what measures. It is no setting: rows may be measured by several, and the file names them all.
    """

    def __init__(self, path: Path, settings: dict[str, Any], copy_to: Path | None, device: str = "CPU") -> None:
        self.path, self.copy_to, self.device = path, copy_to, device
        self.data: dict[str, Any] = {"settings": settings, "base": {}, "rows": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
            if self.data["settings"] != settings:
                raise SystemExit(
                    f"{path} was made with {self.data['settings']}; this run has {settings}. Give another --work or delete it."
                )

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data) + "\n")
        partial.replace(self.path)
        if self.copy_to is not None:
            self.copy_to.mkdir(parents=True, exist_ok=True)
            (self.copy_to / self.path.name).write_text(self.path.read_text())

    def row(self, name: str) -> dict[str, Any]:
        """What is known of a row, to be measured here."""
        devices = self.data.setdefault("devices", [])
        if self.device not in devices:
            devices.append(self.device)
        return self.data["rows"].setdefault(name, {"shifts": {}})

    def has(self, method: Method, shift: int) -> bool:
        return str(shift) in self.data["rows"].get(method.name, {}).get("shifts", {})


@dataclass(kw_only=True)
class Experiment:
    """A model whose `layers` are quantized. `kept` gives, for a method that keeps some in high precision, their names."""

    layers: dict[str, QuantizedLinear]
    groups: Sequence[Sequence[str]]
    score: Callable[[], Scores]
    calibrate: Callable[[str], dict[str, Inputs]]  # of "text" or "random"
    kept: Callable[[Method], Sequence[str]]
    sequential: Callable[[Method, dict[str, Inputs], float, set[str]], dict[str, Tensor]] | None
    results: Results
    reference: bool = False
    deadline: float = float("inf")
    inputs: dict[str, dict[str, Inputs]] = field(default_factory=dict)

    def base(self) -> None:
        """The scores in high precision, which fills whatever later scores are compared with."""
        self._restore()
        scores = self.score()
        self.results.data["base"] = self.results.data["base"] or scores
        self.results.save()

    def _restore(self) -> None:
        for layer in self.layers.values():
            layer.restore()

    def run(self, methods: Sequence[Method], shifts: int) -> bool:
        """Whether everything is done; rows of equal weights are measured together, because GPTQ's take long."""
        assert 0 < shifts <= len(SHIFTS)
        by_weight: dict[WeightMethod, list[Method]] = {}
        for method in methods:
            by_weight.setdefault(method.weight, []).append(method)
        for weight_method, own in by_weight.items():
            for shift in range(shifts):
                missing = [method for method in own if not self.results.has(method, shift)]
                if not missing:
                    continue
                if time.monotonic() > self.deadline:
                    return False
                self._cells(weight_method, missing, shift)
        return True

    def _cells(self, weight_method: WeightMethod, methods: Sequence[Method], shift: int) -> None:
        start = time.perf_counter()
        inputs = self._inputs(weight_method)
        weights: dict[str, Tensor] = {}
        if not weight_method.sequential:
            weights = quantized_weights(self.layers, self.groups, weight_method, inputs, SHIFTS[shift])
        for method in sorted(methods, key=lambda m: m.keep):
            kept = set(self.kept(method)) if method.keep else {n for n in self.layers if n.endswith(method.high)} if method.high else set()
            if weight_method.sequential:
                assert self.sequential is not None
                weights = self.sequential(method, inputs, SHIFTS[shift], kept)
            quantize_inputs(self.layers, method, inputs, SHIFTS[shift], reference=self.reference)
            for name, layer in self.layers.items():
                layer.weight = weights[name]
                if name in kept:
                    layer.restore()
            scores = self.score()
            self._add(method, shift, scores, kept, weight_error(self.layers, weights), extra_k(self.layers, inputs, method.outliers))
            seconds = time.perf_counter() - start
            print(f"{method.name}, shift {shift}: {_short(scores, self.results.data['base'])}, {seconds:.1f} s", flush=True)
            start = time.perf_counter()

    def _inputs(self, weight_method: WeightMethod) -> dict[str, Inputs]:
        if not (weight_method.calibrated or weight_method.ordered):
            return {}
        if weight_method.data not in self.inputs:
            self._restore()
            self.inputs[weight_method.data] = self.calibrate(weight_method.data)
        return self.inputs[weight_method.data]

    def _add(self, method: Method, shift: int, scores: Scores, kept: set[str], error: float, longer: float) -> None:
        sizes = {name: layer.exact.weight.numel() for name, layer in self.layers.items()}
        share = sum(sizes[name] for name in kept) / sum(sizes.values())
        row = self.results.row(method.name)
        row |= {"weight_error": error, "extra_k": longer, "kept": sorted(kept), "kept_flops": share}
        row["shifts"][str(shift)] = scores
        self.results.save()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _short(scores: Scores, base: Scores) -> str:
    parts = []
    for text, measures in scores.items():
        for measure, values in measures.items():
            off = torch.tensor(values).mean() - (torch.tensor(base[text][measure]).mean() if measure == "nll" else 0)
            parts.append(f"{text} {measure} {off:.4f}")
    return ", ".join(parts)
