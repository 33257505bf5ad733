"""A part quantized alone computes what the compiled policy computes; runs resume, refuse what is not theirs, and rank what matters."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp4compile
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.isolation.estimate import spearman
from fp4compile.isolation.keep import CannotChoose
from fp4compile.isolation.loss import NoLoss, NotFinite
from fp4compile.isolation.parts import NothingPlanned, RoleMatchesNothing
from fp4compile.isolation.planned import ModelTrains, PlannedModel
from fp4compile.isolation.result import Sensitivity
from fp4compile.isolation.run import NoBatches, sensitivity
from fp4compile.isolation.store import OtherRun, Store, UnreadableStore
from fp4compile.policy.load import load_policy

VOCABULARY, WIDTH = 40, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(F.layer_norm(x, (WIDTH,)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # predictions that are worth something
        model.layers[1].down.weight.mul_(5)  # and a block that matters more than the others
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (2, 24), generator=generator) for _ in range(3)]


def measured(model: Model, batches: list[Tensor], **options) -> Sensitivity:
    return sensitivity(model, batches, **{"policies": ["nvfp4"], "progress": False, **options})


def next_token(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@torch.no_grad()
@pytest.mark.parametrize("precision", ["w4a4", "w4a16"])
def test_a_role_alone_is_the_compiled_policy_that_quantizes_only_it(model: Model, batches: list[Tensor], precision: str) -> None:
    policy = "nvfp4" if precision == "w4a4" else "nvfp4_a16"
    found = measured(model, batches, policies=[policy], isolate=["role"], estimate=False).rows_of(policy, "role")
    for row in found if precision == "w4a4" else found[1:]:
        only = {"version": 1, "extends": "bf16", "rule": [{"match": f"layers.*.{row.name}", "precision": precision, "format": "nvfp4"}]}
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="fp4", options={"policy": only})
        logits = [(compiled(ids), model(ids)) for ids in batches]
        loss = sum(next_token(q, ids) - next_token(exact, ids) for (q, exact), ids in zip(logits, batches, strict=True)) / 3
        kl = sum(
            (exact.softmax(-1) * (exact.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item() for q, exact in logits
        ) / 3  # fmt: skip
        assert row.loss == pytest.approx(loss, abs=2e-6) and row.kl == pytest.approx(kl, abs=2e-6) and row.kl > 1e-5


def test_rows_name_the_parts_with_their_sizes(model: Model, batches: list[Tensor]) -> None:
    found = measured(model, batches, isolate=["role", "block", "site"], estimate=False)
    assert [row.name for row in found.rows_of("nvfp4", "role")] == ["up", "down"]
    assert [row.name for row in found.rows_of("nvfp4", "block")] == ["layers.0", "layers.1", "layers.2"]
    assert len(found.rows_of("nvfp4", "site")) == 6
    for row in found.rows:
        assert row.parameters == row.matmuls * 2 * WIDTH * WIDTH and row.flops == pytest.approx(row.matmuls / 6)
    everything = found.rows_of("nvfp4", "all")[0]
    assert everything.matmuls == 6 and everything.kl > max(row.kl for row in found.rows_of("nvfp4", "block"))
    assert max(found.rows_of("nvfp4", "block"), key=lambda row: row.effect).name == "layers.1"
    assert everything.per_parameter == pytest.approx(1e6 * everything.kl / (6 * 2 * WIDTH * WIDTH))


def test_the_first_order_estimate_is_gradient_times_error(model: Model, batches: list[Tensor]) -> None:
    found = measured(model, batches, isolate=[]).estimates("nvfp4")
    expected = {f"layers.{i}.{name}": [0.0, 0.0] for i in range(3) for name in ("up", "down")}
    seen: dict[str, Tensor] = {}
    for name in expected:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: (args[0].retain_grad(), seen.update({name: args[0]}))[0]
        )
    for ids in batches:
        model.zero_grad()
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, sums in expected.items():
            weight, x = model.get_submodule(name).weight, seen[name]
            for i, tensor in enumerate((weight, x)):
                rows = tensor.detach().flatten(0, -2)
                error = dequantize_ref(*quantize_ref(rows, QuantConfig())) - rows
                sums[i] += (tensor.grad.flatten(0, -2) * error).sum().item() / len(batches)
    for name, (weight, activation) in expected.items():
        assert found[name].weight == pytest.approx(weight, rel=1e-3, abs=1e-7)
        assert found[name].activation == pytest.approx(activation, rel=1e-3, abs=1e-7)
        assert found[name].curvature > 0


def test_the_curvature_ranks_matmuls_as_their_divergence_does(model: Model, batches: list[Tensor]) -> None:
    found = measured(model, batches, isolate=["site"])
    by_name = {c.estimate: c.rho for c in found.correlations() if c.kind == "site" and c.measured == "kl"}
    assert by_name["curvature"] > 0.7


def test_a_killed_run_goes_on(model: Model, batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "deep" / "store.json"
    whole = measured(model, batches, store=tmp_path / "whole.json")
    save, left = Store.save, [3]

    def killed(self: Store) -> None:
        save(self)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            measured(model, batches, store=store)
    before = json.loads(store.read_text())["policies"]["nvfp4"]["rows"]
    assert len(before) == 2
    resumed = measured(model, batches, store=store)
    assert json.loads(store.read_text())["policies"]["nvfp4"]["rows"][:2] == before
    assert [row.name for row in resumed.rows] == [row.name for row in whole.rows]
    assert [row.loss for row in resumed.rows] == pytest.approx([row.loss for row in whole.rows], abs=1e-7)
    assert not list(store.parent.glob("*.partial"))


def test_another_run_is_refused_by_what_differs(model: Model, batches: list[Tensor], tmp_path: Path) -> None:
    store = tmp_path / "store.json"
    options = {"isolate": [], "estimate": False, "store": store}
    measured(model, batches, **options)
    with pytest.raises(OtherRun, match="another batches"):
        measured(model, batches[:2], **options)
    with pytest.raises(OtherRun, match=r"another loss: .*next_token_loss"):
        measured(model, batches, loss=lambda outputs, batch: outputs.square().mean(), **options)
    with pytest.raises(OtherRun, match="another roles"):
        measured(model, batches, roles={"mlp": "layers.*.*"}, **options)
    policy = tmp_path / "nvfp4.toml"
    policy.write_text('version = 1\nextends = "bf16"\n[[rule]]\nmatch = "up"\nprecision = "w4a4"\nformat = "nvfp4"\n')
    measured(model, batches, **{**options, "policies": [policy]})  # a second policy in the same file
    policy.write_text(policy.read_text().replace("up", "down"))
    with pytest.raises(OtherRun, match="policy called"):
        measured(model, batches, **{**options, "policies": [policy]})
    with torch.no_grad():
        model.layers[0].up.weight[0, 0] += 1
    with pytest.raises(OtherRun, match="another model"):
        measured(model, batches, **options)
    store.write_text("{")
    with pytest.raises(UnreadableStore):
        measured(model, batches, **options)


def test_wrong_data_is_named(model: Model, batches: list[Tensor]) -> None:
    with pytest.raises(NoBatches):
        measured(model, [])
    with pytest.raises(NoBatches, match="batch 1"):
        measured(model, [batches[0], batches[0][:, :0]])
    with pytest.raises(NoLoss, match="float32 tensor"):
        measured(nn.Sequential(nn.Linear(16, 16)).eval(), [torch.randn(4, 16)])
    with pytest.raises(NoLoss, match="scalar"):
        measured(model, batches, loss=lambda outputs, batch: outputs)
    with pytest.raises(NothingPlanned):
        measured(model, batches, policies=["bf16"])
    with pytest.raises(RoleMatchesNothing, match=r"layers\.0\.up"):
        measured(model, batches, roles={"attention": ["self_attn.*"]})
    with pytest.raises(ModelTrains):
        measured(model.train(), batches)


def test_a_loss_that_is_not_finite_is_named_with_its_batch(model: Model, batches: list[Tensor]) -> None:
    with torch.no_grad():
        model.embed.weight[VOCABULARY - 1] = float("nan")
    clean = [ids.clamp(max=VOCABULARY - 2) for ids in batches]
    poisoned = clean[2].clone()
    poisoned[0, 0] = VOCABULARY - 1
    with pytest.raises(NotFinite, match="high precision is nan on batch 2"):
        measured(model, [*clean[:2], poisoned])


def test_roles_by_globs_and_a_loss_of_ones_own(model: Model, batches: list[Tensor]) -> None:
    def norm(outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.square().mean()

    found = measured(model, batches, roles={"edges": ["layers.0.*", "layers.2.*"]}, isolate=["role"], loss=norm)
    rows = {row.name: row for row in found.rows_of("nvfp4", "role")}
    assert set(rows) == {"edges", "up", "down"} and rows["edges"].matmuls == 4
    assert rows["edges"].kl is None and rows["edges"].effect == rows["edges"].loss
    with torch.no_grad():
        exact = sum(model(ids).square().mean().item() for ids in batches) / 3
    assert sum(found.data["baseline"]["loss"]) / 3 == pytest.approx(exact, rel=1e-6)


@torch.no_grad()
def test_what_is_kept_wins_back_the_most_a_flop(model: Model, batches: list[Tensor], tmp_path: Path) -> None:
    found = measured(model, batches, isolate=["role", "block"])
    choice = found.keep(0.4)
    assert choice.flops == pytest.approx(2 / 6) and set(choice.modules) == {"layers.1.up", "layers.1.down"}
    policy = tmp_path / "keep.toml"
    policy.write_text(choice.to_toml())
    torch._dynamo.reset()
    report = fp4compile.explain(model, batches[0], policy=policy)
    assert {site.name for site in report.sites if site.precision == "float32"} >= set(choice.modules)
    assert found.keep(0.0).modules == () and "[[rule]]" not in found.keep(0.0).to_toml()
    for share in (-0.1, 1.0):
        with pytest.raises(CannotChoose):
            found.keep(share)
    with pytest.raises(CannotChoose, match="nothing was measured under 'mxfp4'"):
        found.keep(0.1, policy="mxfp4")


def test_written_results_are_readable(model: Model, batches: list[Tensor], tmp_path: Path) -> None:
    found = measured(model, batches, isolate=["role", "block", "site"], policies=["nvfp4", "mxfp4"])
    found.write(tmp_path)
    data = json.loads((tmp_path / "sensitivity.json").read_text())
    assert len(data["rows"]) == 2 * (1 + 2 + 3 + 6) and data["correlations"]
    text = (tmp_path / "sensitivity.txt").read_text()
    assert "one role at a time" in text and "Spearman" in text and "layers.2.down" in text
    for name in ("roles", "blocks"):
        root = ElementTree.fromstring((tmp_path / f"sensitivity_{name}.svg").read_text())
        drawn = "".join(root.itertext())
        assert "nvfp4" in drawn and "mxfp4" in drawn


def test_spearman() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0]) == pytest.approx(1)
    assert spearman([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert spearman([1.0, 2.0, 2.0, 3.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.9487, abs=1e-4)  # as scipy.stats.spearmanr has it


@torch.no_grad()
def test_everything_under_a_calibrated_policy_with_outliers_is_the_compiled_policy(
    model: Model, batches: list[Tensor], tmp_path: Path
) -> None:
    fp4compile.calibrate(model, batches, out=tmp_path / "c.pt", moments="full", progress=False)
    policy = tmp_path / "arc.toml"
    policy.write_text(
        'version = 1\nextends = "nvfp4"\ncalibration = "c.pt"\n[default]\n'
        'weight = { scale_rule = "local_hessian", rounding = "gptq" }\n'
        'activation = { scale_rule = "four_over_six", arc = { channels = 16, multiple = 16, most = 0.5 } }\n'
    )
    torch._dynamo.reset()
    found = measured(model, batches, policies=[policy], isolate=[])
    everything = found.rows_of("arc.toml", "all")[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fp4", options={"policy": str(policy)})
    logits = [(compiled(ids), model(ids)) for ids in batches]
    kl = sum((exact.softmax(-1) * (exact.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item() for q, exact in logits) / 3
    assert everything.kl == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    assert all(estimate.curvature > 0 for estimate in found.estimates("arc.toml").values())
    layer = model.layers[1].down
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(batches[0])
    handle.remove()
    calls = {}
    planned = PlannedModel(model, load_policy(policy))
    planned(batches[0], lambda call: (calls.update({call.site.name: call}), call.exact())[1])
    of_input, of_weight = calls["layers.1.down"].differences()
    both = calls["layers.1.down"].quantized() - layer(seen[0])
    assert (both - of_input - of_weight).norm() < 0.2 * both.norm()  # what is left is the product of two errors
