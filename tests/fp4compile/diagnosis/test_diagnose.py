"""A diagnosed step shows what plain eager computation shows, and leaves no trace behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from fp4compile.diagnosis.diagnose import Diagnoser, NothingQuantized, diagnose
from fp4compile.diagnosis.measure import OperandSums, measure
from fp4compile.diagnosis.result import Diagnosis, Row

NEAREST = {
    "version": 1,
    "extends": "bf16",
    "default": {"precision": "w4a4", "weight": {"block": "16x16"}},
    "training": {"fprop": "w4a4", "dgrad": "w4a4", "wgrad": {"hadamard": 16}},
}
SR = {**NEAREST, "training": {**NEAREST["training"], "dgrad": {"gradient": {"rounding": "stochastic"}}}}
ONE_D, TILE, ROTATED = QuantConfig(), QuantConfig(block="16x16"), QuantConfig(hadamard=16)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32, bias=False))


def tensors(tokens: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, 64, generator=generator), torch.randn(tokens, 32, generator=generator)


def rows_of(diagnosis: Diagnosis) -> dict[tuple[str, str, str], Row]:
    return {(row.matmul, row.role, row.operand): row for row in diagnosis.rows}


def quantized(x: torch.Tensor, config: QuantConfig, axis: int = -1) -> torch.Tensor:
    return fp4compile.quantize(x, block=config.block, hadamard=config.hadamard, axis=axis).dequantize()


def assert_shows(row: Row, sums: OperandSums) -> None:
    for name in ("underflow", "saturation", "clipped_maxima", "clipped_by", "sqnr_db", "bias", "gain_bias", "amax"):
        assert getattr(row, name) == pytest.approx(getattr(sums, name), rel=1e-4, abs=1e-7), name


def test_every_operand_of_every_role_equals_eager_computation() -> None:
    model, (x, dy) = two_layers(), tensors()
    first, second = model[0].weight.detach(), model[1].weight.detach()
    x.requires_grad_()
    rows = rows_of(diagnose(model, lambda run: run(x).backward(dy), policy=NEAREST))
    x = x.detach()
    hidden = scaled_mm_ref(*quantize_ref(x, ONE_D), *quantize_ref(first, TILE), model[0].bias.detach(), 64, torch.float32)
    dhidden = scaled_mm_ref(*quantize_ref(dy, ONE_D), *quantize_ref(second, TILE, axis=-2), None, 32, torch.float32)
    expected = {
        ("0", "fprop", "activation"): (x, ONE_D, -1),
        ("0", "fprop", "weight"): (first, TILE, -1),
        ("1", "fprop", "activation"): (hidden, ONE_D, -1),
        ("1", "fprop", "weight"): (second, TILE, -1),
        ("1", "dgrad", "gradient"): (dy, ONE_D, -1),
        ("1", "dgrad", "weight"): (second, TILE, -2),
        ("0", "dgrad", "gradient"): (dhidden, ONE_D, -1),
        ("0", "dgrad", "weight"): (first, TILE, -2),
        ("1", "wgrad", "gradient"): (dy, ROTATED, -2),
        ("1", "wgrad", "activation"): (hidden, ROTATED, -2),
        ("0", "wgrad", "gradient"): (dhidden, ROTATED, -2),
        ("0", "wgrad", "activation"): (x, ROTATED, -2),
    }
    assert rows.keys() == expected.keys()
    for key, (value, config, axis) in expected.items():
        assert_shows(rows[key], measure(value, config, axis=axis, draws=1)[1])
        assert rows[key].quantized == config.describe() and rows[key].calls == 1


def test_the_product_is_held_against_the_unquantized_one() -> None:
    model, (x, dy) = two_layers(), tensors()
    rows = rows_of(diagnose(model, lambda run: run(x).backward(dy), policy=NEAREST))
    exact = x @ model[0].weight.detach().T + model[0].bias.detach()
    got = quantized(x, ONE_D) @ quantized(model[0].weight.detach(), TILE).T + model[0].bias.detach()
    decibels = 10 * torch.log10(exact.square().sum() / (got - exact).square().sum())
    assert rows["0", "fprop", "weight"].product_db == pytest.approx(float(decibels), abs=1e-3)
    assert rows["0", "fprop", "activation"].product_db == rows["0", "fprop", "weight"].product_db


def test_draws_tell_bias_from_noise() -> None:
    model, (x, dy) = two_layers(), tensors(512)
    x.requires_grad_()
    row = rows_of(diagnose(model, lambda run: run(x).backward(dy), policy=SR, draws=32))["1", "dgrad", "gradient"]
    nearest = measure(dy, ONE_D, axis=-1, draws=1)[1]
    assert row.sqnr_db < nearest.sqnr_db - 2  # one draw is noisier than nearest rounding
    assert 0 < row.gain_error < 2e-3
    assert -0.01 < row.gain_bias < 0.002  # clipped maxima and 8-bit draws shorten, by 0.4 % on a Gaussian
    assert row.quantized == "nvfp4+sr"


def test_training_goes_on_as_if_nobody_had_looked() -> None:
    def trained(look: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        model, (x, dy) = nn.Sequential(two_layers(), nn.BatchNorm1d(32)), tensors()
        run = torch.compile(model, backend="fp4", options={"policy": SR})
        diagnoser = Diagnoser(run, policy=SR, draws=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        for _ in range(3):
            run(x).backward(dy)
            if look:
                assert diagnoser(lambda watched: watched(x).backward(dy)).rows
            optimizer.step()
            optimizer.zero_grad()
        return [*(p.detach() for p in model.parameters()), *model.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(trained(look=False), trained(look=True), strict=True))


def test_a_diagnosis_is_no_compilation_of_the_model() -> None:
    model, (x, dy) = two_layers(), tensors()
    run = torch.compile(model, backend="fp4", options={"policy": NEAREST})
    run(x).backward(dy)
    before = fp4compile.last_report().sites
    diagnose(run, lambda watched: watched(x).backward(dy), policy=NEAREST)
    run(x).backward(dy)
    assert fp4compile.last_report().sites == before


def test_micro_batches_of_one_step_add_up() -> None:
    model, (x, dy) = two_layers(), tensors()

    def step(run):
        for part in (slice(0, 16), slice(16, 32), slice(32, 48)):
            run(x[part]).backward(dy[part])

    row = rows_of(diagnose(model, step, policy=NEAREST))["0", "fprop", "activation"]
    assert row.calls == 3 and row.elements == x.numel() and row.amax == float(x.abs().max())


def test_a_diagnoser_serves_many_steps_and_sizes() -> None:
    model, (x, dy) = two_layers(), tensors(64)
    look = Diagnoser(model, policy=NEAREST)
    for tokens in (64, 32, 64):
        rows = rows_of(look(lambda run, n=tokens: run(x[:n]).backward(dy[:n])))
        assert rows["0", "fprop", "activation"].elements == 64 * tokens and len(rows) == 10  # x needs no gradient


def test_random_signs_are_shared_by_both_operands() -> None:
    """Else the rotation would not cancel, and the product would be noise alone."""
    model, (x, dy) = two_layers(), tensors()
    wgrad = {"hadamard": 16, "gradient": {"signs": "random"}, "activation": {"signs": "random"}}
    policy = {**NEAREST, "training": {**NEAREST["training"], "wgrad": wgrad}}
    found = diagnose(model, lambda run: run(x).backward(dy), policy=policy)
    rows = [row for row in found.rows if row.role == "wgrad"]
    assert rows and all(row.product_db > 10 and "random signs" in row.quantized for row in rows)


def test_a_schedule_is_followed() -> None:
    model, (x, dy) = two_layers(), tensors()
    look = Diagnoser(model, policy={**NEAREST, "schedule": [{"from_step": 5, "fprop": "bf16"}]})
    roles = []
    for step in (4, 5, 0):
        fp4compile.set_step(step)
        roles.append({row.role for row in look(lambda run: run(x).backward(dy)).rows})
    fp4compile.set_step(0)
    assert roles == [{"fprop", "dgrad", "wgrad"}, {"dgrad", "wgrad"}, {"fprop", "dgrad", "wgrad"}]


def test_inference_and_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nn.Flatten(2), nn.Linear(16, 48)).eval()
    policy = {"version": 1, "extends": "bf16", "rule": [{"match": "**", "precision": "w4a4"}]}
    with torch.no_grad():
        found = diagnose(model, lambda run: run(torch.randn(2, 3, 32, 32)), policy=policy)
    assert {(row.matmul, row.role) for row in found.rows} == {("0", "fprop"), ("2", "fprop")}


def test_weight_only_policies_show_the_weight_alone() -> None:
    model, (x, _) = two_layers(), tensors()
    found = diagnose(model, lambda run: run(x), policy="nvfp4_a16")
    assert {row.operand for row in found.rows} == {"weight"}


def test_nothing_to_show_is_an_error() -> None:
    model, (x, _) = two_layers(), tensors()
    with pytest.raises(NothingQuantized, match=r"quantized nothing in this step \(5 matmuls, all in high precision\)"):
        diagnose(model, lambda run: run(x), policy="bf16")
    with pytest.raises(NothingQuantized, match="no graph was run"):
        diagnose(model, lambda run: None, policy=NEAREST)


def test_table_json_and_picture(tmp_path) -> None:
    model, (x, dy) = two_layers(), tensors()
    found = fp4compile.diagnose(model, lambda run: run(x).backward(dy), policy=NEAREST)
    text = str(found)
    assert "fprop activation" in text and "least SQNR" in text and len(found.to_table(full=True).splitlines()) == len(found.rows) + 2
    read = json.loads(found.to_json())
    assert read["draws"] == 16 and len(read["rows"]) == len(found.rows)
    assert read["rows"][0]["matmul"] == "0" and 10 < read["rows"][0]["sqnr_db"] < 30
    found.write(tmp_path, name="step_1")
    picture = (tmp_path / "step_1.svg").read_text()
    assert picture.count("<title>wgrad gradient</title>") == 6 and "NaN" not in picture
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1.json", "step_1.svg", "step_1.txt"]


def test_eden_is_measured_as_the_backward_rotates_and_rounds() -> None:
    eden = {"hadamard": 128, "signs": "random", "gradient": {"rounding": "eden"}}
    of_forward = {"rounding": "eden", "source": "forward"}
    training = {"fprop": "w4a4", "dgrad": {**eden, "weight": of_forward}, "wgrad": {**eden, "activation": of_forward}}
    policy = {"version": 1, "extends": "bf16", "default": {"precision": "w4a4"}, "training": training}
    model, (x, dy) = two_layers(), tensors(128)
    found = diagnose(model, lambda run: run(x).mul(dy).sum().backward(), policy=policy, draws=8)
    rows = [row for row in found.rows if row.role != "fprop"]
    assert {(row.role, row.operand) for row in rows} == {
        ("dgrad", "gradient"),
        ("dgrad", "weight"),
        ("wgrad", "gradient"),
        ("wgrad", "activation"),
    }
    assert all(19.5 < row.sqnr_db < 21.0 and abs(row.gain_bias) < 0.004 for row in rows)
