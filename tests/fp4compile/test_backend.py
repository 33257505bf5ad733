"""What a user of torch.compile may count on: the name, options, modes, caches, dynamic shapes, graph breaks, reset, errors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.options import Options
from tests.fp4compile.eager_recipe import Recipe, with_recipe

BF16 = torch.bfloat16
W4A4 = Recipe()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).to(dtype)


def check(run, model: nn.Module, x: torch.Tensor, recipe: Recipe = W4A4) -> None:
    want = with_recipe(copy.deepcopy(model), recipe)(x)
    assert float((run(x) - want).norm() / want.norm()) < 1e-3


def test_registered_by_entry_point_without_an_import() -> None:
    code = """
import torch
assert "fp4" in torch.compiler.list_backends()
print(torch.compile(torch.nn.Linear(16, 16), backend="fp4")(torch.ones(2, 16)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([2, 16])" in done.stdout


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_as_argument_and_as_option(mode: str) -> None:
    model, x = mlp(), torch.randn(4, 32)
    a16 = Recipe(fprop_x=None)  # the default policy on a CPU
    check(torch.compile(model, backend="fp4", mode=mode), model, x, a16)
    torch._dynamo.reset()
    check(torch.compile(model, backend="fp4", options={"mode": mode, "policy": "nvfp4"}), model, x)


@torch.no_grad()
def test_one_dynamic_graph_serves_all_lengths() -> None:
    model = mlp()
    run = torch.compile(model, backend="fp4", options={"policy": "nvfp4"}, dynamic=True)
    for rows in (2, 3, 16, 33):
        check(run, model, torch.randn(rows, 32))
    assert len(fp4compile.last_report().graphs) == 1


@torch.no_grad()
def test_graph_breaks_give_a_report_of_all_parts() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model = Broken()
    check(torch.compile(model, backend="fp4", options={"policy": "nvfp4"}), model, torch.randn(4, 32))
    report = fp4compile.last_report()
    assert len(report.graphs) == 2 and {row.name for row in report.sites} == {"a", "b"}


@torch.no_grad()
def test_reset_forgets_reports_and_compiles_again() -> None:
    model, x = mlp(), torch.randn(4, 32)
    torch.compile(model, backend="fp4")(x)
    assert fp4compile.last_report().sites
    torch._dynamo.reset()
    assert not fp4compile.last_report().sites
    torch.compile(model, backend="fp4")(x)
    assert fp4compile.last_report().sites


CACHED = """
    import json, torch
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 32))
    with torch.no_grad():
        out = torch.compile(model, backend="fp4", options={"policy": POLICY})(torch.ones(3, 32))
    import fp4compile
    rows = [row.precision for row in fp4compile.last_report().sites]
    print(json.dumps({"out": out.flatten().tolist(), "hit": counters["inductor"]["fxgraph_cache_hit"], "rows": rows}))
"""


def test_inductors_cache_is_hit_and_keyed_by_policy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def run(policy: str) -> dict:
        code = textwrap.dedent(CACHED).replace("POLICY", repr(policy))
        return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    first, again, other = run("nvfp4"), run("nvfp4"), run("mxfp4")
    assert (first["hit"], again["hit"], other["hit"]) == (0, 1, 0)
    assert first["out"] == again["out"] != other["out"]
    assert first["rows"] == again["rows"] == ["nvfp4 W4A4"] * 2  # the report is whole on a warm start too


@torch.no_grad()
def test_environment_gives_defaults_and_options_beat_it(monkeypatch) -> None:
    monkeypatch.setenv("FP4COMPILE_POLICY", "mxfp4")
    monkeypatch.setenv("FP4COMPILE_STRICT", "1")
    assert Options.parse() == Options(policy="mxfp4", strict=True)
    assert Options.parse({"policy": "nvfp4", "strict": False}) == Options(policy="nvfp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "nvfp4"}, "unknown option 'polcy' .* Did you mean 'policy'"),
        ({"strict": "yes"}, "option 'strict': found 'yes', needed bool"),
        ({"mode": "fast"}, "unknown mode 'fast'. .*max-autotune"),
        ({"policy": "nvfp44"}, "nvfp44.*nvfp4"),
        ({"policy": {"version": 1, "extends": "nvfp4", "rule": [{"match": "no.such.layer", "precision": "high"}]}}, "no.such.layer"),
        ({"policy": {"version": 1, "extends": "nvfp4", "ruel": []}}, "ruel.*rule"),
    ],
    ids=["option", "type", "mode", "preset", "matches-nothing", "key"],
)
def test_bad_input_is_named_and_leaves_the_model_usable(options, message) -> None:
    model, x = mlp(), torch.randn(4, 32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match=f"(?s){message}"):
        torch.compile(model, backend="fp4", options=options)(x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    torch._dynamo.reset()
    with torch.no_grad():
        check(torch.compile(model, backend="fp4", options={"policy": "nvfp4"}), model, x)


def test_broken_toml_names_file_and_line(tmp_path) -> None:
    (tmp_path / "policy.toml").write_text('version = 1\nextends = "nvfp4\n')
    with pytest.raises(Exception, match=r"policy.toml:2:17"):
        torch.compile(mlp(), backend="fp4", options={"policy": str(tmp_path / "policy.toml")})(torch.randn(4, 32))


def test_unsupported_device_is_named() -> None:
    with pytest.raises(Exception, match=r"(?s)UnsupportedDevice.*device meta.*cpu or cuda"):
        torch.compile(mlp().to("meta"), backend="fp4")(torch.randn(4, 32, device="meta"))


@torch.no_grad()
def test_unsupported_dtype_is_a_row_or_under_strict_an_error() -> None:
    model, x = mlp(torch.float64), torch.randn(4, 32, dtype=torch.float64)
    run = torch.compile(model, backend="fp4", options={"policy": "nvfp4"})
    torch.testing.assert_close(run(x), model(x))
    assert {row.precision for row in fp4compile.last_report().sites if row.fallback} == {"float64"}
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"SiteFellBack: strict: 0 .* dtype float64"):
        torch.compile(model, backend="fp4", options={"policy": "nvfp4", "strict": True})(x)


@torch.no_grad()
def test_explain_builds_nothing_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48), nn.Linear(48, 32)).train()
    before = copy.deepcopy(model.state_dict())
    report = fp4compile.explain(model, torch.randn(8, 32), policy="nvfp4")
    assert [row.precision for row in report.sites] == ["nvfp4 W4A4"] * 2
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not fp4compile.last_report().sites  # a dry run is not a compilation


@torch.no_grad()
def test_explain_can_be_asked_often_and_leaves_compilations_to_the_user() -> None:
    """Dynamo stops compiling one function after 8 times: neither may dry runs see nothing then, nor eat up the user's share."""
    model, x = mlp(), torch.randn(8, 32)
    seen = [len(fp4compile.explain(model, x, policy="nvfp4").sites) for _ in range(10)]
    assert seen == [seen[0]] * 10 and seen[0] > 0
    torch.compile(model, backend="fp4", options={"policy": "nvfp4"})(x)
    assert len(fp4compile.last_report().sites) == seen[0]


@torch.no_grad()
def test_explain_shows_a_dynamic_graph_once() -> None:
    """Inductor gives up on a graph with a symbolic float and asks Dynamo for another one."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale = nn.Linear(32, 32), 0.3

        def forward(self, x):
            return self.up(x) * self.scale

    x = torch.randn(8, 32)
    torch._dynamo.mark_dynamic(x, 0)
    with torch._dynamo.config.patch(assume_static_by_default=False):
        report = fp4compile.explain(Scaled(), x, policy="nvfp4")
    assert [len(graph.sites) for graph in report.graphs] == [1]


def test_explain_shows_the_backward_too() -> None:
    report = fp4compile.explain(mlp(), torch.randn(8, 32), policy="nvfp4_train")
    assert {row.role for row in report.sites} >= {"fprop", "wgrad"}


@torch.no_grad()
def test_dump_holds_every_pass_and_the_policy(tmp_path) -> None:
    torch.compile(mlp(), backend="fp4", options={"policy": "nvfp4", "dump": str(tmp_path)})(torch.randn(4, 32))
    (graph,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    names = {p.name for p in graph.iterdir()}
    assert {"graph.svg", "graph.dot", "report.md", "report.json", "policy.toml"} <= names
    assert sum(name.endswith("-insert-quantize.py") for name in names) == 1
