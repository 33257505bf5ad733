"""Decoder layers: right ones pass the check against the uncompiled model, another format does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.bench import layer
from fp4compile.bench.case import LayerCase, layer_cases
from fp4compile.bench.floor import Speeds
from fp4compile.bench.layer import measure_layer
from fp4compile.bench.llama import LLAMAS, DecoderLayers
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.timing import Effort

CPU = torch.device("cpu")
SPEEDS = Speeds(copy=1000.0, matmul=1e6)
ONCE = Effort(rounds=1, turn=0)


def case(policy: str, phase: str = "decode") -> LayerCase:
    tokens, context = (1, 8) if phase == "decode" else (6, 0)
    return LayerCase(model="tiny", phase=phase, policy=policy, mode="default", tokens=tokens, context=context, layers=1)


def measured(given: LayerCase):
    return measure_layer(given, CPU, ONCE, SPEEDS)


def test_decode_attends_to_its_context_and_prefill_to_its_past() -> None:
    """Decoding the last token after a prefilled context gives what prefilling all of them gives."""
    shape = LLAMAS["tiny"]
    prefill = DecoderLayers.build("tiny", layers=2, context=0, device=CPU).float()
    decode = DecoderLayers.build("tiny", layers=2, context=5, device=CPU).float()
    decode.load_state_dict(prefill.state_dict())
    x = torch.randn(1, 6, shape.hidden)
    with torch.no_grad():
        whole = prefill(x, torch.arange(6))
        for t in range(6):
            one = decode_masked(decode, x[:, t : t + 1], t)
            assert torch.allclose(one, whole[:, t : t + 1], atol=1e-4)


def decode_masked(model: DecoderLayers, x: torch.Tensor, t: int) -> torch.Tensor:
    """As with a context of `t` positions: later ones, still random, are cut off."""
    attentions = [part.self_attn for part in model.layers]
    kept = [(a.keys, a.values) for a in attentions]
    for a in attentions:
        a.keys, a.values = a.keys[:, :, : t + 1], a.values[:, :, : t + 1]
    out = model(x, torch.tensor([t]))
    for a, (keys, values) in zip(attentions, kept, strict=True):
        a.keys, a.values = keys, values
    return out


@pytest.mark.parametrize(("policy", "phase"), [("nvfp4", "prefill"), ("nvfp4_a16", "decode")])
def test_a_compiled_layer_is_right_timed_and_covered(policy, phase) -> None:
    row = measured(case(policy, phase))
    assert row.wrong == "" and row.failed == {} and row.is_good
    assert row.times["ours"] > 0 and row.errors["share of FP4's error"] < 0.1
    assert row.notes["quantized"] == 7 and row.notes["compile_seconds"] > 0
    weights = sum(
        p.numel() for m in DecoderLayers(LLAMAS["tiny"], layers=1, context=0).modules() if isinstance(m, nn.Linear) for p in m.parameters()
    )
    norms = 2 * LLAMAS["tiny"].hidden * 2
    assert row.notes["weight_bytes"] - norms == pytest.approx(weights * 4.5 / 8, rel=0.01)
    if phase == "decode":
        assert row.floor_by == "bytes" and row.floor == pytest.approx(weights * 4.5 / 8 / SPEEDS.copy)


def test_the_baseline_is_timed_under_its_own_name() -> None:
    row = measured(case("bf16"))
    assert set(row.times) == {"bf16"} and row.is_good and "quantized" not in row.notes


def test_another_format_than_the_policys_is_wrong(monkeypatch) -> None:
    monkeypatch.setitem(layer.POLICIES, "nvfp4_a16", QuantConfig(format="mxfp4"))
    row = measured(case("nvfp4_a16", "prefill"))
    assert "of FP4's own error" in row.wrong and row.times == {} and not row.is_good


def test_a_layer_that_raises_becomes_a_row_with_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(layer, "_compiled", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    row = measured(case("nvfp4"))
    assert row.failed == {"ours": "RuntimeError: out of memory"} and not row.is_good


def test_the_baseline_comes_before_what_is_compared_with_it() -> None:
    cases = layer_cases("tiny", ["nvfp4"], ["default", "reduce-overhead"], ["decode", "prefill"], prefill=16, context=8, layers=2)
    assert [c.policy for c in cases] == ["bf16", "nvfp4"] * 4
    more = layer_cases("tiny", ["nvfp4"], ["default", "reduce-overhead"], ["decode", "prefill"], prefill=16, context=8, layers=3)
    assert len({c.key for c in (*cases, *more)}) == 16
