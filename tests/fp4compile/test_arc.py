"""ARCQuant as a policy line: compiled equals the same recipe run eagerly, shared, stored once a weight, refused where it is illegal."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp4compile
from fp4compile.calibration.outliers import OutlierRule, outliers_of
from fp4compile.calibration.record import Calibration, load_calibration
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.outliers import Outliers
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.residual import in_order_ref, quantize_residual_ref
from fp4compile.policy.load import load_policy
from fp4compile.weights import STORE
from tests.fp4compile.llama import Llama

X = QuantConfig(scale_rule="four_over_six", global_scale="row")  # type: ignore[arg-type]
W = QuantConfig(scale_rule="sweep")  # type: ignore[arg-type]
ARC = {"threshold": 0.4, "multiple": 16, "most": 0.5}
EXAMPLES = Path(__file__).parents[2] / "examples" / "policies"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(seed))


def llama() -> Llama:
    torch.manual_seed(0)
    model = Llama(layers=1, width=64, inner=80).eval()
    for norm in (model.blocks[0].norm_1, model.blocks[0].norm_2):
        norm.weight.data[::9] *= 6  # outliers
    return model


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("arc") / "llama.pt"
    fp4compile.calibrate(llama(), [tokens(1), tokens(2)], out=path, moments="full", progress=False)
    return path


def policy(artefact: Path, **arc: Any) -> dict[str, Any]:
    activation = {"scale_rule": "four_over_six", "global_scale": "row", "arc": {**ARC, **arc}}
    default = {"activation": activation, "weight": {"scale_rule": "sweep"}}
    return {"version": 1, "extends": "nvfp4", "calibration": str(artefact), "default": default}


def compiled(model: nn.Module, policy: dict[str, Any], **options: Any) -> Any:
    return torch.compile(model, backend="fp4", options={"policy": policy, "strict": True, "verify": True, **options})


class EagerArc(nn.Module):
    """Values of the activation, twice where it is an outlier, times those of the weight as often; one rounding at the end."""

    def __init__(self, layer: nn.Linear, outliers: Outliers) -> None:
        super().__init__()
        self.layer, self.outliers = layer, outliers

    def forward(self, x: Tensor) -> Tensor:
        order, count = self.outliers.order, self.outliers.count
        values = dequantize_ref(*quantize_residual_ref(x.flatten(0, -2), order, count, X))
        weight = dequantize_ref(*quantize_ref(in_order_ref(self.layer.weight, order, W), W)).unflatten(-1, (-1, 16))
        plain = weight.shape[-2] - count // 16
        twice = torch.cat([weight[:, :plain], weight[:, plain:].repeat_interleave(2, -2)], dim=-2).flatten(-2)
        return (values @ twice.T).to(x.dtype).view(*x.shape[:-1], -1)


def eager(model: Llama, calibration: Calibration, rule: OutlierRule) -> Llama:
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            statistics = calibration.statistics_for(path)
            outliers = outliers_of(statistics, rule, 16, site=path, k=layer.in_features)
            assert outliers is not None
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, EagerArc(layer, outliers))
    return model


@pytest.mark.parametrize("reorder", [True, False], ids=["channels", "blocks"])
def test_a_compiled_llama_is_the_eager_recipe(artefact: Path, reorder: bool) -> None:
    model, x = llama(), tokens(3)
    got = compiled(model, policy(artefact, reorder=reorder))(x)
    want = eager(model, load_calibration(artefact), OutlierRule(**ARC, reorder=reorder))(x)
    # Sums of float32 in another order may turn a code of a later layer.
    assert (got - want).norm() <= 0.005 * want.norm()
    plain = policy(artefact)
    plain["default"]["activation"]["arc"] = False
    exact = model(x)
    assert (got - exact).norm() < (compiled(model, plain)(x) - exact).norm()


def test_the_report_shows_the_wider_product_and_shared_codes(artefact: Path) -> None:
    model, x = llama(), tokens(3)
    rows = {row.name: row for row in fp4compile.explain(model, x, policy=policy(artefact)).sites}
    query = rows["blocks.0.q_proj"]
    assert query.extra_k == 16 and query.k == "64" and query.operands.endswith(", arc16")
    assert query.bytes_after == 64 * (64 + 16) * 9 // 16 + 4
    compiled(model, policy(artefact))(x)
    report = fp4compile.last_report()
    assert report.graphs[0].shared == 3  # k and v by q, up by gate
    assert "64+16" in report.to_table()


def test_a_weight_is_stored_once_and_by_its_order(artefact: Path) -> None:
    model, before = llama(), STORE.quantizations
    one, other = compiled(model, policy(artefact)), compiled(model, policy(artefact, reorder=False))
    for run, quantized in ((one, 8), (other, 16), (one, 16)):
        run(tokens(3))
        assert STORE.quantizations - before == quantized


def test_freed_weights_come_back_from_their_codes(artefact: Path) -> None:
    model = llama()
    original = model.blocks[0].down_proj.weight.clone()
    compiled(model, policy(artefact), free_weights=True)(tokens(3))
    assert fp4compile.restore(model) == 8
    statistics = load_calibration(artefact).statistics_for("blocks.0.down_proj")
    order = outliers_of(statistics, OutlierRule(**ARC), 16, site="", k=80).order.long()  # type: ignore[union-attr]
    values = dequantize_ref(*quantize_ref(original[:, order], W))
    assert torch.equal(model.blocks[0].down_proj.weight[:, order], values)


def test_weights_by_gptq_take_part(artefact: Path) -> None:
    model, x = llama(), tokens(1)
    calibrated = policy(artefact)
    calibrated["default"]["weight"] = {"scale_rule": "local_hessian", "rounding": "gptq"}
    exact = model(x)
    assert (compiled(model, calibrated)(x) - exact).norm() < 0.9 * (compiled(model, policy(artefact))(x) - exact).norm()


def test_what_was_not_calibrated_is_named(artefact: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    with pytest.raises(BackendCompilerFailed, match=r"MissingStatistics: 0: llama.pt has no statistics of it"):
        compiled(model, policy(artefact))(torch.zeros(4, 64))


def test_training_is_refused_and_a_rule_can_leave_it_out(artefact: Path) -> None:
    model, x = llama(), tokens(3)
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match=r"arc in a graph with a backward.*torch\.no_grad"):
        compiled(model, policy(artefact))(x)
    torch._dynamo.reset()
    rule = {"match": "**", "graph": "training", "activation": {"arc": False}}
    with torch.enable_grad():
        report = fp4compile.explain(model, x, policy={**policy(artefact), "rule": [rule]})
    assert report.graphs[0].training and all(row.extra_k == 0 for row in report.sites)


@pytest.mark.parametrize("name", ["arc", "calibrated"])
def test_the_example_policies_are_legal(name: str) -> None:
    text = (EXAMPLES / f"{name}.toml").read_text()
    assert load_policy(tomllib.loads(text), calibrated=False).to_toml().count("arc = {") == 1


def test_the_calibrated_example_loses_less_than_plain_nvfp4(tmp_path: Path) -> None:
    """From the file alone, as its comment says; only the multiple of channels is that of a small model."""
    text = (EXAMPLES / "calibrated.toml").read_text().replace("multiple = 64", "multiple = 16")
    recipe = {**tomllib.loads(text), "calibration": str(tmp_path / "calibration.pt")}
    model, x = llama(), tokens(3)
    fp4compile.calibrate(model, [tokens(seed) for seed in range(10, 26)], policy=recipe, progress=False)
    found = compiled(model, recipe)(x)
    rows = [row for row in fp4compile.last_report().graphs[0].sites if row.name.endswith("_proj")]
    assert len(rows) == 7 and all(row.extra_k == 16 for row in rows)
    torch._dynamo.reset()
    plain, exact = compiled(model, {"version": 1, "extends": "nvfp4"})(x), model(x)
    assert (found - exact).norm() < 0.8 * (plain - exact).norm()
