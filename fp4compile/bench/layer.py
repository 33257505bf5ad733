"""How much faster a model gets: decoder layers compiled with a policy beside the same in bfloat16, with and without CUDA graphs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

import fp4compile
from fp4compile.backend import fp4
from fp4compile.bench.case import LayerCase
from fp4compile.bench.floor import Speeds
from fp4compile.bench.llama import DecoderLayers
from fp4compile.bench.peers import BASELINE, describe, failures
from fp4compile.bench.results import OURS, Row
from fp4compile.codegen.formats import NVFP4, QuantConfig
from fp4compile.codegen.timing import Effort
from fp4compile.demo.fake_quant import FakeQuantLinear
from fp4compile.handoff import rounding_like_eager

Run = Callable[[], Tensor]
POLICIES: Final = {"nvfp4": QuantConfig(), "nvfp4_a16": None}  # what an activation becomes; the weight is QuantConfig()
# The difference of one layer to the same numbers computed operator by operator, as a share of the error that FP4 makes in it, when both
# round to bfloat16 at the same places: right layers have 0.00 to 0.11, and where the largest activation rounds differently, and with it a
# twentieth of the block scales, 0.3 can be; another format on one operand has 0.68 and more in the median (`demo/check.py`).
WORST_SHARE: Final = 0.5


@torch.no_grad()
def measure_layer(case: LayerCase, device: torch.device, effort: Effort, speeds: Speeds) -> Row:
    """One row: a layer is verified against itself uncompiled on dequantized values, then all are timed as a user calls them."""
    model = DecoderLayers.build(case.model, layers=case.layers, context=case.context, device=device)
    x = torch.randn(1, case.tokens, model.shape.hidden, device=device).bfloat16()
    position = torch.arange(case.context, case.context + case.tokens, device=device)
    row = partial(Row, kind=case.kind, key=case.key, case=case.as_json())
    name = BASELINE if case.policy == BASELINE else OURS
    try:
        share = None if name == BASELINE else _share_of_error(case, model, x, position)
        errors = {} if share is None else {"share of FP4's error": share}
        if share is not None and not share <= WORST_SHARE:
            wrong = f"a layer differs from itself uncompiled by {share:.2f} of FP4's own error, {WORST_SHARE} is allowed"
            return row(wrong=wrong, errors=errors)
        run, seconds = _compiled(case, model, x, position)
        if not run().isfinite().all():
            return row(wrong="the output is not finite", errors=errors)
        times, notes = {name: _microseconds(run, device, effort)}, _notes(case, model)
    except failures() as failure:
        return row(failed={name: describe(failure)})
    floor, floor_by = _floor(case, model, speeds)
    return row(errors=errors, times=times, floor=floor, floor_by=floor_by, notes={"compile_seconds": round(seconds, 2), **notes})


def _share_of_error(case: LayerCase, model: DecoderLayers, x: Tensor, position: Tensor) -> float:
    """Of the first layer, rounded to bf16 where eager mode does."""
    torch.compiler.reset()
    one = DecoderLayers(model.shape, layers=0, context=case.context)
    one.layers.append(model.layers[0])
    options = {"policy": case.policy, "inductor": rounding_like_eager(x.device)}
    found = torch.compile(one, backend=fp4, dynamic=False, options=options)(x, position)
    expected = _fake_quantized(one, POLICIES[case.policy])(x, position)
    return ((found - expected).float().norm() / (one(x, position) - expected).float().norm()).item()


def _compiled(case: LayerCase, model: nn.Module, x: Tensor, position: Tensor) -> tuple[Run, float]:
    """A call, warm, and the seconds its first one took."""
    torch.compiler.reset()
    if case.policy == BASELINE:
        forward = torch.compile(model, mode=case.mode, dynamic=False)
    else:
        forward = torch.compile(model, backend=fp4, dynamic=False, options={"policy": case.policy, "mode": case.mode})

    def run() -> Tensor:
        return forward(x, position)

    start = time.perf_counter()
    _finished(run())
    seconds = time.perf_counter() - start
    for _ in range(3):  # CUDA graphs warm up, record, replay
        _finished(run())
    return run, seconds


def _notes(case: LayerCase, model: nn.Module) -> dict[str, Any]:
    """How much of the model got 4 bits, and what its weights take."""
    size = sum(p.nbytes for p in model.parameters())
    if case.policy == BASELINE:
        return {"weight_bytes": size}
    coverage = fp4compile.last_report().coverage
    size += coverage.bytes_after - coverage.bytes_before
    return {"matmuls": coverage.sites, "quantized": coverage.quantized, "weight_bytes": size}


def _fake_quantized(model: nn.Module, activation: QuantConfig | None) -> nn.Module:
    model = copy.deepcopy(model)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        model.set_submodule(name, FakeQuantLinear(linear, QuantConfig(), activation))
    return model


def _microseconds(run: Run, device: torch.device, effort: Effort) -> float:
    """Median over rounds of call after call, without waiting between them: what a generation loop pays for a step."""
    once = _turn(run, device, 3)
    calls = max(3, min(200, round(10 * effort.turn / once)))
    return median(_turn(run, device, calls) for _ in range(effort.rounds))


def _turn(run: Run, device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    _finished(run())
    return (time.perf_counter() - start) * 1e6 / calls


def _finished(out: Tensor) -> None:
    if out.is_cuda:
        torch.cuda.synchronize(out.device)


def _floor(case: LayerCase, model: nn.Module, speeds: Speeds) -> tuple[float, str]:
    """Each weight is read once, each product is a multiplication and an addition; attention is left out, as are the activations."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    bits = 16 if case.policy == BASELINE else NVFP4.bits_per_value
    by_bytes, by_operations = weights * bits / 8 / speeds.copy, 2 * weights * case.tokens / speeds.matmul
    return (by_bytes, "bytes") if by_bytes >= by_operations else (by_operations, "operations")
