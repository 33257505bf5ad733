"""The pretraining example in small: it learns, NVFP4 stays close to bf16, and a killed run goes on bit for bit."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import fp4compile

FOLDER = Path(__file__).parents[2] / "examples" / "pretrain"
MODULES = ("checkpoint", "debian_text", "model", "plot", "prepare_text", "pretrain", "recipes", "token_windows")


@pytest.fixture(scope="module", autouse=True)
def as_a_script():
    """`python examples/pretrain/pretrain.py` finds its neighbours because it stands beside them."""
    sys.path.insert(0, str(FOLDER))
    yield
    torch.use_deterministic_algorithms(False)
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    fp4compile.set_step(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Python's own help texts: real prose on every machine."""
    import prepare_text

    folder = tmp_path_factory.mktemp("text")
    prepare_text.main(["--data", str(folder), "--source", "pydoc", "--vocabulary", "512"])
    return folder


def run(text: Path, out: Path, *more: str) -> str:
    import pretrain

    return pretrain.main(["--data", str(text), "--out", str(out), "--size", "test", "--device", "cpu", *more])


def log_of(folder: Path) -> list[dict[str, float]]:
    """Without what differs between two runs of one program."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "speed"} for row in rows]


def test_loss_goes_down_and_nvfp4_stays_close(text: Path, tmp_path: Path) -> None:
    table = run(text, tmp_path, "--tokens", "20k", "--diagnose-every", "40", "--evaluate-every", "40")
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert rows.keys() == {"bf16", "nvfp4_train"}
    logs = {name: log_of(tmp_path / name) for name in rows}
    for name, log in logs.items():
        losses = [row["loss"] for row in log if "loss" in row]
        assert len(losses) == 20_000 // (4 * 64) and losses[0] == pytest.approx(math.log(512), abs=0.3), name
        assert sum(losses[-8:]) / 8 < losses[0] - 1.2, name
    heldout = {name: log[-1]["heldout"] for name, log in logs.items()}
    assert 0 < abs(heldout["nvfp4_train"] / heldout["bf16"] - 1) < 0.03
    assert rows["nvfp4_train"][4] == f"{100 * (heldout['nvfp4_train'] / heldout['bf16'] - 1):+.2f}%"
    assert (tmp_path / "curves.svg").read_text().count("<title>nvfp4_train</title>") == 3
    found = json.loads((tmp_path / "nvfp4_train" / "diagnosis" / "step_000040.json").read_text())
    assert {row["role"] for row in found["rows"]} == {"fprop", "dgrad", "wgrad"}
    assert (tmp_path / "nvfp4_train" / "diagnosis.svg").read_text().count("<title>wgrad gradient</title>") == 4


class Killed(BaseException):
    """As a signal would end the process: in the middle of a step, with nothing saved."""


def test_a_killed_run_goes_on_bit_for_bit(text: Path, tmp_path: Path, monkeypatch) -> None:
    """The policy switches at the eighth step: what is restored includes the place in its schedule."""
    import token_windows

    arguments = ("--recipe", "late_switch", "--tokens", "2304", "--save-every", "4", "--evaluate-every", "3", "--log-every", "2")
    run(text, tmp_path / "whole", *arguments)
    fetch = token_windows.Windows.batch

    def batch(self, first, count, device):
        if first == 6 * 4 + 2:  # the second micro-batch of the seventh step
            raise Killed
        return fetch(self, first, count, device)

    monkeypatch.setattr(token_windows.Windows, "batch", batch)
    torch._dynamo.reset()
    with pytest.raises(Killed):
        run(text, tmp_path / "killed", *arguments)
    assert len(log_of(tmp_path / "killed" / "late_switch")) == 6 + 2  # two steps will be done again
    monkeypatch.undo()
    torch._dynamo.reset()
    run(text, tmp_path / "killed", *arguments)
    assert log_of(tmp_path / "killed" / "late_switch") == log_of(tmp_path / "whole" / "late_switch")
    ends = [torch.load(tmp_path / way / "late_switch" / "checkpoint.pt") for way in ("whole", "killed")]
    assert ends[0]["step"] == 9
    assert all(torch.equal(ends[0]["model"][name], ends[1]["model"][name]) for name in ends[0]["model"])
    assert torch.equal(ends[0]["random"], ends[1]["random"])


def test_a_time_limit_saves_and_the_same_command_goes_on(text: Path, tmp_path: Path, capsys) -> None:
    """And only the same: runs of other settings are not mixed."""
    import pretrain

    arguments = ("--recipe", "bf16", "--tokens", "768")
    run(text, tmp_path, *arguments, "--limit-minutes", "0")
    assert "bf16: out of time, saved." in capsys.readouterr().out
    assert [row["step"] for row in log_of(tmp_path / "bf16") if "loss" in row] == [1]
    run(text, tmp_path, *arguments)
    assert [row["step"] for row in log_of(tmp_path / "bf16") if "loss" in row] == [1, 2, 3]
    with pytest.raises(pretrain.OtherRun, match=r'"seed": 0.*now asked for.*"seed": 1'):
        run(text, tmp_path, *arguments, "--seed", "1")


def test_a_recipe_begins_at_a_checkpoint_of_another(text: Path, tmp_path: Path) -> None:
    """`late_switch` is `nvfp4_train` until it switches: begun there, it ends where it would have ended."""
    common = ("--tokens", "2560", "--evaluate-every", "8")
    run(text, tmp_path / "whole", "--recipe", "late_switch", *common)
    run(text, tmp_path / "branch", "--recipe", "nvfp4_train", "--keep", "8", *common)
    run(
        text,
        tmp_path / "branch",
        "--recipe",
        "late_switch",
        "--begin-from",
        str(tmp_path / "branch/nvfp4_train/checkpoint_000008.pt"),
        *common,
    )
    whole, branch = (log_of(tmp_path / way / "late_switch") for way in ("whole", "branch"))
    assert [row["step"] for row in branch] == [9, 10, 10] and branch == whole[-3:]
    with pytest.raises(SystemExit):
        run(text, tmp_path / "none", "--recipe", "late_switch", "--begin-from", str(tmp_path / "none.pt"), *common)


def test_gaps_are_taken_seed_by_seed(tmp_path: Path) -> None:
    import plot

    for seed, (base, other) in enumerate(((3.0, 3.2), (4.0, 4.3))):
        for name, loss in (("bf16", base), ("nvfp4_train", other), ("half_done", 9.0)):
            folder = tmp_path / str(seed) / name
            folder.mkdir(parents=True)
            tokens = 50 if name == "half_done" else 100
            (folder / "log.jsonl").write_text(json.dumps({"step": 1, "tokens": tokens, "heldout": loss}) + "\n")
    lines = plot.across_seeds([tmp_path / "0", tmp_path / "1"]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [["bf16", "2", "3.5000 (0.5000)", "", ""], ["nvfp4_train", "2", "3.7500 (0.5500)", "0.2500 (0.0500)", "+7.14%"]]


def rows_under(name: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(matmul, role) -> precision and operands, as the compiler decides for a two-layer model."""
    from model import Llama, Shape
    from recipes import RECIPES

    model = Llama(Shape(width=128, layers=2, heads=2, hidden=128), 256, 32)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    rows = fp4compile.explain(model, tokens, tokens, policy=RECIPES[name].full_policy(100)).sites
    return {(row.name, row.role): (row.precision, row.operands) for row in rows}


def test_each_ablation_differs_in_what_its_name_says() -> None:
    full = rows_under("nvfp4_train")
    assert full["layers.0.mlp.up_proj", "wgrad"][1] == "nvfp4+sr+h16 x nvfp4+h16"
    assert full["layers.1.mlp.down_proj", "fprop"][0] == "float32" == full["lm_head", "fprop"][0]

    def changes(name: str) -> dict[str, set[tuple[str, str]]]:
        other = rows_under(name)
        assert other.keys() == full.keys()
        found: dict[str, set[tuple[str, str]]] = {}
        for (matmul, role), what in other.items():
            if what != full[matmul, role]:
                found.setdefault(role, set()).add(what)
        return found

    assert changes("without_sr") == {"dgrad": {("nvfp4 W4A4", "nvfp4 x nvfp4+16x16")}, "wgrad": {("nvfp4 W4A4", "nvfp4+h16 x nvfp4+h16")}}
    assert changes("without_rht") == {"wgrad": {("nvfp4 W4A4", "nvfp4+sr x nvfp4")}}
    assert changes("without_2d") == {"fprop": {("nvfp4 W4A4", "")}, "dgrad": {("nvfp4 W4A4", "nvfp4+sr x nvfp4")}}
    assert changes("four_over_six").keys() == {"fprop", "dgrad", "wgrad"} and "sr+four" not in str(changes("four_over_six"))
    assert changes("late_switch") == {}
    high = {matmul for (matmul, _), (precision, _) in rows_under("without_high").items() if precision == "float32"}
    assert high == {"lm_head", "layers.0.self_attn", "layers.1.self_attn"}  # the head, and attention's own products


def test_the_late_switch_comes_after_four_fifths_of_the_steps() -> None:
    full = rows_under("nvfp4_train")
    for step, switched in ((79, False), (80, True)):
        fp4compile.set_step(step)
        rows = rows_under("late_switch")
        assert all(rows[key] == full[key] for key in rows if key[1] != "fprop")
        assert all((rows[key][0] == "float32") for key in rows if key[1] == "fprop") is switched


def test_the_order_of_the_data_is_a_function_of_the_step() -> None:
    import numpy as np
    from token_windows import Windows

    windows = Windows(tokens=np.arange(10 * 16 + 1, dtype=np.uint16), length=16, seed=3)
    tokens, targets = windows.batch(0, 20, "cpu")
    starts = (tokens[:, 0] // 16).tolist()
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(10)) and starts[:10] != starts[10:]
    assert torch.equal(targets, tokens + 1)
    again = torch.cat([windows.batch(first, 5, "cpu")[0] for first in (15, 0, 10, 5)])
    assert torch.equal(again, tokens[[*range(15, 20), *range(5), *range(10, 15), *range(5, 10)]])


def test_learning_rate_warms_up_and_decays() -> None:
    from pretrain import Settings

    shape = {"size": "test", "tokens": 100 * 256, "batch": 4, "micro_batch": 4, "sequence": 64, "vocabulary": 256}
    common = {**shape, "rate": 1.0, "warmup": 0.05, "seed": 0}
    cosine, wsd = (Settings(decay=decay, **common) for decay in ("cosine", "wsd"))
    for settings in (cosine, wsd):
        rates = [settings.rate_at(step) for step in range(settings.steps)]
        assert rates[0] < rates[2] < rates[5] and max(rates) <= 1.0 and rates[-1] <= 0.1
    assert cosine.rate_at(99) == pytest.approx(0.1) and wsd.rate_at(70) == 1.0 and wsd.rate_at(90) == pytest.approx(0.45)


def test_sizes_are_those_of_the_published_runs() -> None:
    from model import SIZES, Llama

    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for n, p in Llama(shape, 8192, 512).named_parameters() if "layers" in n) for name, shape in SIZES.items()
        }
    assert 28e6 < counts["30m"] < 33e6 and 95e6 < counts["100m"] < 105e6 and counts["cpu"] < 1.2e6
    assert all(width % 128 == 0 for shape in SIZES.values() for width in (shape.width, shape.hidden))
