"""Policies that name an artefact: the codes are those of `quantize_for_inputs` on its moments, and what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp4compile
from fp4compile.calibration.check import AnotherModel
from fp4compile.calibration.record import Calibration, MissingStatistics, load_calibration
from fp4compile.calibration.source import AnotherCalibration, NotCalibrated
from fp4compile.codegen.calibrated import quantize_for_inputs
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from fp4compile.codegen.statistics import StaleCalibration
from fp4compile.isolation.planned import Call, PlannedModel
from fp4compile.policy.load import load_policy
from fp4compile.weights import STORE
from tests.fp4compile.calibration.test_run import llama, token_batches

METHODS = {
    "gptq": {"rounding": "gptq", "scale_rule": "sweep"},
    "local_hessian": {"scale_rule": "local_hessian"},
    "gptq_local_hessian": {"rounding": "gptq", "scale_rule": "local_hessian"},
}


class SharedInput(nn.Module):
    """q and k read one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x)


ROWS = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 32)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("calibration") / "c.pt"
    fp4compile.calibrate(llama(layers=1), token_batches(2), out=path, moments="full", progress=False)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `SharedInput` and `ROWS`."""
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("calibration") / "c.pt"
    fp4compile.calibrate(SharedInput(), [ROWS], out=path, moments="full", progress=False)
    return path


def policy(artefact: Path, *, extends: str = "nvfp4_a16", **default: Any) -> dict[str, Any]:
    return {"version": 1, "extends": extends, "calibration": str(artefact), "default": default}


def compiled(model: nn.Module, policy: dict[str, Any], **options: Any) -> Any:
    return torch.compile(model, backend="fp4", options={"policy": policy, "strict": True, **options})


def codes_of(weight: Tensor) -> tuple[Tensor, ...]:
    ((_, values),) = STORE.codes_of(weight)
    return values


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def refused(error: type[Exception], said: str) -> Iterator[None]:
    """While it is compiled: torch wraps what a backend raises."""
    with pytest.raises(BackendCompilerFailed, match=said) as found:
        yield
    assert isinstance(found.value.inner_exception, error)


def assert_codes(found: tuple[Tensor, ...], expected: Any, name: str) -> None:
    for got, want in zip(found, (expected.codes, expected.scales, expected.global_scale), strict=True):
        assert torch.equal(got.float(), want.float()), name


@pytest.mark.parametrize(("method", "extends", "more"), [
    ("gptq", "nvfp4_a16", {}),
    ("gptq_local_hessian", "nvfp4", {"hadamard": 16}),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_codes_are_those_of_quantize_for_inputs(artefact: Path, method: str, extends: str, more: dict[str, Any]):
    model, statistics = llama(layers=1), load_calibration(artefact)
    rotation = {"hadamard": more["hadamard"]} if "hadamard" in more else {}
    weight = {**METHODS[method], **more}
    compiled(model, policy(artefact, extends=extends, weight=weight, **rotation))(token_batches(1)[0])
    for name, linear in linears(model).items():
        moments = statistics.statistics_for(name).moments
        expected = quantize_for_inputs(linear.weight, moments, QuantConfig(scale_rule="sweep", **more), method=method)
        assert_codes(codes_of(linear.weight), expected, name)


@torch.no_grad()
def test_blocks_of_moments_are_enough_for_scales(tmp_path: Path):
    model, made = SharedInput(), tmp_path / "c.pt"
    fp4compile.calibrate(model, [ROWS], out=made, progress=False)
    assert load_calibration(made).statistics_for("q").moments is None
    compiled(model, policy(made, weight={"scale_rule": "local_hessian", "format": "mixfp4"}))(ROWS)
    moments = ROWS.T @ ROWS / len(ROWS)
    for name, linear in linears(model).items():
        expected = quantize_for_inputs(linear.weight, moments, QuantConfig(format="mixfp4"), method="local_hessian")
        assert_codes(codes_of(linear.weight), expected, name)


@pytest.mark.parametrize("rotation", [{}, {"hadamard": 16}], ids=str)
@torch.no_grad()
def test_a_static_scale_is_the_calibrated_amax(tmp_path: Path, rotation: dict[str, int]):
    model, made, x = SharedInput(), tmp_path / "c.pt", torch.randn(8, 32)
    wanted = policy(made, extends="nvfp4", activation={"global_scale": "static"}, **rotation)
    statistics = fp4compile.calibrate(model, [2 * x, x], policy=wanted, progress=False).statistics_for("q")
    assert statistics.amax == 2 * x.abs().amax().item() != statistics.rotated_amax.get(16)
    found = compiled(model, wanted)(x)
    assert fp4compile.last_report().graphs[-1].shared == 1
    torch._dynamo.reset()
    by_hand = {"global_scale": "static", "static_amax": statistics.rotated_amax[16] if rotation else statistics.amax}
    expected = compiled(model, {"version": 1, "extends": "nvfp4", "default": {"activation": by_hand, **rotation}})(x)
    assert torch.equal(found, expected)


def test_what_an_artefact_lacks(tmp_path: Path):
    model, made, x = SharedInput(), tmp_path / "c.pt", torch.randn(8, 32)
    only_q = {"version": 1, "extends": "bf16", "rule": [{"match": "q", "precision": "w4a16"}]}
    fp4compile.calibrate(model, [0 * x], policy=only_q, out=made, progress=False)
    static = {"activation": {"global_scale": "static"}}
    for wanted, said in (
        (policy(made, extends="nvfp4", **static), "q: its input was zero throughout when c.pt was calibrated"),
        (policy(made, extends="nvfp4", **static, hadamard=32), "q: c.pt has no amax of its input after hadamard = 32. Calibrate for this"),
        (policy(made, weight=METHODS["local_hessian"]), "k: c.pt has no statistics of it, only of 1 others. Calibrate for the policy"),
    ):
        with refused(MissingStatistics, said), torch.no_grad():
            fp4compile.explain(model, x, policy=wanted)
    fp4compile.calibrate(model, [x], out=made, progress=False)
    lacking = r"q: c.pt holds the moments of its input in blocks of 16 channels, and nvfp4\+sweep\+gptq needs all. Calibrate with moments"
    with refused(MissingStatistics, lacking), torch.no_grad():
        fp4compile.explain(model, x, policy=policy(made, weight=METHODS["gptq"]))


@torch.no_grad()
def test_a_new_artefact_quantizes_anew(small: Path, tmp_path: Path):
    model, other = SharedInput(), tmp_path / "c.pt"
    fp4compile.calibrate(model, [ROWS.flip(1)], out=other, moments="full", progress=False)
    before, codes = STORE.quantizations, []
    for path in (small, other, small):
        torch._dynamo.reset()
        compiled(model, policy(path, weight=METHODS["gptq"]))(ROWS)
        codes.append(STORE.codes_of(model.q.weight)[-1][1][0].clone())
    assert STORE.quantizations - before == 2 * len(linears(model)) and not torch.equal(codes[0], codes[1])
    policies = [load_policy(policy(path, weight=METHODS["gptq"])) for path in (small, other)]
    assert len({p.fingerprint() for p in policies}) == 2


@torch.no_grad()
def test_texts_hold_names_and_no_paths(small: Path, tmp_path: Path):
    compiled(SharedInput(), policy(small, weight=METHODS["gptq"]), dump=str(tmp_path))(ROWS)
    texts = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".py", ".toml", ".md", ".json")}
    (last,) = (text for name, text in texts.items() if name.endswith("-cleanup.py"))
    assert "calibration='q@" in last and "calibration='k@" in last
    assert 'calibration = "c.pt"' in texts["policy.toml"]
    assert not any(str(small.parent) in text for text in texts.values())


def test_weights_that_changed_since(small: Path):
    model, wanted = SharedInput(), policy(small, weight=METHODS["gptq"])
    run = compiled(model, wanted)
    with torch.no_grad():
        run(ROWS)
        model.k.weight[0] *= 2
        with pytest.raises(StaleCalibration, match=r"^k: its weight is not the one that c.pt was calibrated with"):
            run(ROWS)
        with refused(StaleCalibration, r"k: its weight"):
            fp4compile.explain(model, ROWS, policy=wanted)
        model.load_state_dict(SharedInput().state_dict())
        run(ROWS)
        assert fp4compile.explain(model.bfloat16(), ROWS.bfloat16(), policy=wanted).sites  # a cast model is the same one


def test_training_under_calibrated_weights_ends_at_the_first_step(tmp_path: Path):
    model, x, made = nn.Linear(32, 16, bias=False), torch.randn(8, 32), tmp_path / "c.pt"
    fp4compile.calibrate(model, [x], out=made, progress=False)
    run, optimizer = compiled(model, policy(made, weight=METHODS["local_hessian"])), torch.optim.SGD(model.parameters(), lr=0.1)
    run(x).square().mean().backward()
    optimizer.step()
    with pytest.raises(StaleCalibration):
        run(x)


@torch.no_grad()
def test_an_artefact_of_another_model(artefact: Path):
    tokens = token_batches(1)[0]
    for model, error, said in (
        (llama(layers=2), AnotherModel, r"blocks.1.q_proj: .* it has no parameter blocks.1.q_proj.weight"),
        (llama(layers=1, inner=96), AnotherModel, r"blocks.0.gate_proj: .* there blocks.0.gate_proj.weight is \(80, 32\), here \(96, 32\)"),
        (nn.Sequential(nn.Linear(16, 16)), AnotherModel, r"0: c.pt was calibrated with another model: it has no parameter 0.weight"),
        (llama(layers=1).requires_grad_(False).apply(_renewed), StaleCalibration, r"blocks.0.q_proj: "),
    ):
        given = torch.randn(2, 16) if isinstance(model, nn.Sequential) else tokens
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with refused(error, said):
            fp4compile.explain(model, given, policy=policy(artefact, weight=METHODS["local_hessian"]))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _renewed(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight)


def test_layers_that_no_batch_reached(tmp_path: Path):
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, which: bool) -> Tensor:
            return self.first(x) if which else self.second(x)

    model, made = Either(), tmp_path / "c.pt"
    found = fp4compile.calibrate(model, [(torch.randn(4, 16), True)], out=made, progress=False)
    assert found.unreached == ("second.weight",)
    with torch.no_grad():
        wanted = policy(made, weight=METHODS["local_hessian"])
        assert fp4compile.explain(model, torch.randn(4, 16), True, policy=wanted).sites
        with refused(MissingStatistics, "second: no batch reached it when c.pt was calibrated"):
            compiled(model, wanted)(torch.randn(4, 16), False)


@torch.no_grad()
def test_a_layer_called_twice_is_quantized_once_for_all_that_it_reads(tmp_path: Path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(torch.relu(self.up(x)))

    model, made, x = Twice(), tmp_path / "c.pt", torch.randn(64, 32)
    fp4compile.calibrate(model, [x], out=made, moments="full", progress=False)
    compiled(model, policy(made, weight=METHODS["gptq"]))(x)
    rows = torch.cat([x, torch.relu(model.up(x))])
    expected = quantize_for_inputs(model.up.weight, rows.T @ rows / len(rows), QuantConfig(scale_rule="sweep"))
    assert_codes(codes_of(model.up.weight), expected, "up")


@torch.no_grad()
def test_freed_weights_come_back_from_calibrated_codes(small: Path):
    model, wanted = SharedInput(), policy(small, weight=METHODS["gptq"])
    before = compiled(model, wanted, free_weights=True)(ROWS)
    assert fp4compile.last_report().graphs[-1].freed_bytes
    torch._dynamo.reset()
    assert torch.equal(compiled(model, wanted)(ROWS), before)  # codes are there, the weights are not
    assert fp4compile.restore(model) == len(linears(model))
    assert torch.allclose(model(ROWS), before, rtol=1e-3, atol=1e-4)


def test_what_is_refused_when_a_policy_is_loaded(artefact: Path, tmp_path: Path):
    def load(**document: Any) -> Any:
        return load_policy({"version": 1, "extends": "nvfp4", **document})

    gptq = {"weight": METHODS["gptq"]}
    with pytest.raises(NotCalibrated, match=r"its calibration file no.pt does not exist. Make it with `fp4compile calibrate"):
        load(calibration="no.pt", default=gptq)
    with pytest.raises(IllegalCombination, match=r"needs a calibration artefact, .* Run `fp4compile calibrate`"):
        load(default=gptq)
    with pytest.raises(IllegalCombination, match="static scale and its calibrated amax come together"):
        load(default={"activation": {"global_scale": "static"}})
    with pytest.raises(IllegalCombination, match="rounding = gptq on the activation"):
        load(calibration=str(artefact), default={"activation": {"rounding": "gptq"}})
    with pytest.raises(IllegalCombination, match="the amax of a weight is its own"):
        load(calibration=str(artefact), default={"weight": {"global_scale": "static"}})
    with pytest.raises(IllegalCombination, match=r"dgrad weight\): it asks for statistics of a calibration"):
        load(calibration=str(artefact), default=gptq, training={"dgrad": "w4a4"})
    with pytest.raises(AnotherCalibration, match=r"calibration_digest = '1234', but c.pt has"):
        load(calibration=str(artefact), calibration_digest="1234", default=gptq)


def test_files_are_found_beside_the_policy_that_names_them(tmp_path: Path):
    (tmp_path / "base").mkdir()
    Calibration(entries=(), weights={}, operands={}, batches=0).save(tmp_path / "base" / "c.pt")
    gptq = 'weight = { rounding = "gptq" }'
    (tmp_path / "base" / "base.toml").write_text(f'version = 1\nextends = "nvfp4"\ncalibration = "c.pt"\n[default]\n{gptq}\n')
    (tmp_path / "own.toml").write_text('version = 1\nextends = "base/base.toml"\n')
    policy = load_policy(tmp_path / "own.toml")
    assert policy.calibration is not None and policy.calibration.label == "base/c.pt" and policy.calibration.found is not None
    (tmp_path / "resolved.toml").write_text(policy.to_toml())
    assert load_policy(tmp_path / "resolved.toml") == policy
    (tmp_path / "other.toml").write_text('version = 1\nextends = "base/base.toml"\ncalibration = "not there.pt"\n')
    assert load_policy(tmp_path / "other.toml", calibrated=False).calibrated_by == "not there.pt"
    with pytest.raises(NotCalibrated, match=r"other.toml: its calibration file not there.pt"):
        load_policy(tmp_path / "other.toml")


@torch.no_grad()
def test_diagnosis_and_sensitivity_follow_calibrated_policies(tmp_path: Path):
    model, made, x = SharedInput().eval(), tmp_path / "c.pt", torch.randn(64, 32)
    wanted = policy(made, extends="nvfp4", weight=METHODS["gptq"], activation={"global_scale": "static"}, hadamard=16)
    fp4compile.calibrate(model, [x], policy=wanted, progress=False)
    expected = compiled(model, wanted)(x)
    rows = {(row.matmul, row.operand): row for row in fp4compile.diagnose(model, lambda run: run(x), policy=wanted).rows}
    for name in ("q", "k"):
        codes = codes_of(getattr(model, name).weight)
        rotated = hadamard_ref(getattr(model, name).weight, 16)
        error = (dequantize_ref(*codes) - rotated).square().sum() / rotated.square().sum()
        assert rows[name, "weight"].sqnr_db == pytest.approx(-10 * error.log10().item(), abs=1e-3)
        assert rows[name, "weight"].quantized == "nvfp4+sweep+h16+gptq"
    found = PlannedModel(model, load_policy(wanted))(x, Call.quantized)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
