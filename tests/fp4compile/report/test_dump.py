"""A dump holds every step as text that runs, equals the dump of the next run, and says nothing of the machine."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fp4compile
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.passes.pipeline import PIPELINE
from fp4compile.report.dump import Dump, DumpFolderUnusable
from tests.captured_graphs import Mlp, capture_graphs, tiny_llama
from tests.fp4compile.report.transformed_graphs import transform

STEPS = ["00-captured.py", *(f"{i:02}-{each.name}.py" for i, each in enumerate(PIPELINE, 1))]
INSERTED = next(name for name in STEPS if name.endswith("-insert-quantize.py"))
REST = ["graph.dot", "graph.svg", "passes.json", "policy.toml", "report.json", "report.md"]


def dump_mlp(folder: Path, *, policy: Any = "nvfp4", training: bool = False, dynamic: bool = True) -> Path:
    torch.manual_seed(0)
    captured = capture_graphs(Mlp().bfloat16(), torch.randn(6, 32, dtype=torch.bfloat16), training=training, dynamic=dynamic)[0]
    _, record = transform(captured, policy, instruments=(Dump(folder),))
    return Path(record.dump)


def execute(file: Path) -> Any:
    namespace: dict[str, Any] = {"__name__": "dumped"}
    exec(compile(file.read_text(), file.name, "exec"), namespace)
    torch.manual_seed(3)
    return namespace["graph"](*namespace["example_inputs"]())


def test_folder_holds_every_step_and_the_rest(tmp_path: Path) -> None:
    folder = dump_mlp(tmp_path)
    assert folder == tmp_path / "graph_0_0_inference"
    assert sorted(f.name for f in folder.iterdir()) == sorted([*STEPS, *REST])
    assert (folder / INSERTED).read_text().startswith("# after insert-quantize | 4 changed\n")
    passes = json.loads((folder / "passes.json").read_text())
    assert [p["name"] for p in passes] == [each.name for each in PIPELINE]
    assert all(p["milliseconds"] >= 0 for p in passes)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_every_step_runs_and_means_the_same(tmp_path: Path, training: bool) -> None:
    """Up to quantization the numbers are those of the model, bit for bit; after it they are again the same in each step."""
    folder = dump_mlp(tmp_path, training=training)
    outputs = {name: execute(folder / name) for name in STEPS}
    quantized = STEPS.index(INSERTED)
    for name in STEPS[1:quantized]:
        torch.testing.assert_close(outputs[name], outputs[STEPS[0]], rtol=0, atol=0)
    for name in STEPS[quantized + 1 :]:
        torch.testing.assert_close(outputs[name], outputs[STEPS[quantized]], rtol=0, atol=0)
    before, after = outputs[STEPS[0]][0].float(), outputs[STEPS[-1]][0].float()
    error = (before - after).norm() / before.norm()
    # An operand of normal numbers loses 9.5% in NVFP4, so a product 13.4%, and four of them in a row at most twice that.
    assert 0.01 < error < 0.27, "the quantized graph is near the original and is not it"


def test_two_dumps_differ_in_their_times_alone(tmp_path: Path) -> None:
    first, second = (dump_mlp(tmp_path / name, policy="nvfp4_train", training=True) for name in "ab")
    for name in [*STEPS, *REST]:
        if name != "passes.json":
            assert (first / name).read_text() == (second / name).read_text(), name


def test_values_keep_their_names_from_step_to_step(tmp_path: Path) -> None:
    folder = dump_mlp(tmp_path)
    before, after = (set(code_lines(folder / name)) for name in STEPS[STEPS.index(INSERTED) :][:2])
    assert after <= before, "sharing finds nothing to share here, so that each line must be the same"
    exponentials = [line for line in code_lines(folder / "00-captured.py") if "aten.exp." in line]
    assert len(exponentials) == 2
    assert all(line in code_lines(folder / STEPS[-1]) for line in exponentials)


def code_lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def test_nothing_of_the_machine_is_in_a_dump(tmp_path: Path) -> None:
    folder = dump_mlp(tmp_path, policy="nvfp4_train", training=True)
    paths = (str(tmp_path), sys.prefix, str(Path(torch.__file__).parent), os.getcwd(), str(Path.home()), f"/{getpass.getuser()}/")
    for file in folder.iterdir():
        text = file.read_text()
        found = [p for p in paths if p.strip("/") and p in text]
        assert not found, f"{file.name} names {found}"
        assert not re.search(r"0x[0-9a-f]{6,}", text), file.name


def test_report_page_says_what_the_folder_holds(tmp_path: Path) -> None:
    page = (dump_mlp(tmp_path) / "report.md").read_text()
    assert "It holds no weights and no data." in page
    assert "![transformed graph](graph.svg)" in page
    assert "layers.{0..1}.up x2" in page
    assert str(tmp_path) not in page


def test_another_graph_adds_a_folder_and_the_same_one_is_written_anew(tmp_path: Path) -> None:
    folder = dump_mlp(tmp_path)
    (folder / "99-old-pass.py").write_text("from a version with more passes")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "old.py").write_text("")
    (folder / "notes.txt").write_text("the user's own")
    dump_mlp(tmp_path, training=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["graph_0_0_inference", "graph_0_0_training"]
    assert (folder / "99-old-pass.py").exists(), "another graph leaves this one alone"
    dump_mlp(tmp_path)
    assert not (folder / "99-old-pass.py").exists()
    assert not (folder / "kernels" / "old.py").exists()
    assert (folder / "notes.txt").read_text() == "the user's own"


def test_kernels_get_a_file_each(tmp_path: Path) -> None:
    dump = Dump(tmp_path)
    dump.start("3/1", capture_graphs(Mlp(), torch.randn(2, 32))[0].gm)
    dump.write_kernel("scaled_mm.py", "def kernel(): ...\n")
    assert (tmp_path / "graph_3_1_inference" / "kernels" / "scaled_mm.py").read_text() == "def kernel(): ...\n"


def test_a_folder_that_cannot_be_made_is_an_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    dump = Dump(tmp_path / "file")
    gm = capture_graphs(Mlp(), torch.randn(2, 32))[0].gm
    with pytest.raises(DumpFolderUnusable, match=r"dump: cannot write .*00-captured.py \(Not a directory\)\. .*FP4COMPILE_DUMP") as error:
        dump.start("0/0", gm)
    assert isinstance(error.value, Fp4CompileError)
    assert isinstance(error.value, OSError)


def test_the_dumped_policy_decides_the_same_again(tmp_path: Path) -> None:
    first = dump_mlp(tmp_path / "first", policy="nvfp4_train", training=True)
    second = dump_mlp(tmp_path / "second", policy=str(first / "policy.toml"), training=True)
    drop = ("policy", "rule", "reason")  # these name the file instead of the preset
    rows = [[{k: v for k, v in row.items() if k not in drop} for row in json.loads((f / "report.json").read_text())["graphs"][0]["sites"]]
            for f in (first, second)]  # fmt: skip
    assert rows[0] == rows[1]
    assert any("W4A4" in row["precision"] for row in rows[0])


def test_dump_option_of_the_backend(tmp_path: Path) -> None:
    model, ids = tiny_llama(layers=1).bfloat16(), torch.randint(0, 64, (2, 16))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="fp4", options={"policy": "nvfp4", "dump": str(tmp_path)})(input_ids=ids)
    folder = tmp_path / "graph_0_0_inference"
    assert fp4compile.last_report().graphs[0].dump == str(folder)
    assert set(STEPS) <= {f.name for f in folder.iterdir()}
    logits = execute(folder / STEPS[-1])
    assert torch.utils._pytree.tree_leaves(logits)[-1].shape == (2, 16, 64)


def test_branches_of_a_condition_have_folders_of_their_own(tmp_path: Path) -> None:
    layer = torch.nn.Linear(32, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(
            lambda x: torch.cond(x.sum() > 0, lambda v: layer(v), lambda v: v.cos(), (x,)), backend="fp4", options={"dump": str(tmp_path)}
        )
        compiled(torch.randn(4, 32))
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names[0] == "graph_0_0_inference"
    assert [re.sub("[0-9a-f]{6}$", "", n) for n in names[1:]] == ["graph_0_0_inference_branch_"] * 2
    assert "torch.ops.higher_order.cond(" in (tmp_path / names[0] / "00-captured.py").read_text()
