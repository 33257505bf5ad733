"""`fp4compile policy`: exit codes, messages, and output that reads back. `cli.main` prints what is raised here and exits with 1."""

from __future__ import annotations

import argparse
import json
import re

import pytest

from fp4compile.cli_policy import FileExists, add_parser
from fp4compile.codegen.errors import UnknownName
from fp4compile.policy.load import load_policy
from fp4compile.policy.presets import preset_names


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def command(*args: str) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        parsed = parser.parse_args(["policy", *args])
        code = parsed.run(parsed)
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def broken(tmp_path):
    (tmp_path / "broken.toml").write_text('version = 1\nextends = "nvfp4"\n[[rule]]\nmach = "lm_head"\nprecision = "high"\n')
    return "broken.toml"


MESSAGE = "unknown key 'mach' in broken.toml, rule 1. Did you mean 'match'?"


def test_check_says_ok_and_what_a_matmul_gets(run):
    code, out, err = run("check", "nvfp4_train")
    assert (code, err) == (0, "")
    rules = len(load_policy("nvfp4_train").rules)
    assert out.startswith(f"nvfp4_train: ok. {rules} rules; 0 of them are errors where they match nothing.")
    assert "gradient nvfp4+sr+h16, activation nvfp4+h16" in out


@pytest.mark.parametrize("verb", ["check", "show"])
def test_a_broken_file_is_refused_with_its_message(run, broken, verb):
    with pytest.raises(UnknownName) as refused:
        run(verb, broken)
    assert str(refused.value).startswith(MESSAGE)


def test_check_json(run, broken):
    code, out, _ = run("check", "auto", "--json")
    assert code == 0
    assert [v["name"] for v in json.loads(out)["variants"]] == ["auto -> nvfp4", "auto -> nvfp4_a16", "auto -> nvfp4_train"]
    code, out, err = run("check", broken, "--json")
    said = json.loads(out)
    assert (code, err, said["ok"], said["error"]) == (1, "", False, "UnknownName")
    assert said["message"].startswith(MESSAGE)


def test_show_lists_the_presets(run):
    code, out, _ = run("show")
    assert code == 0 and all(re.search(rf"^{name} ", out, re.MULTILINE) for name in preset_names())
    assert [row["name"] for row in json.loads(run("show", "--json")[1])] == list(preset_names())


def test_show_prints_every_rule_in_order(run):
    out = run("show", "nvfp4_train")[1]
    labels = re.findall(r"preset \w+, rule \d+", out)
    assert labels == [rule.label for rule in load_policy("nvfp4_train").rules]


def test_show_json_holds_what_the_table_shows(run):
    (variant,) = json.loads(run("show", "nvfp4_train", "--json")[1])["variants"]
    assert variant["settings"]["training wgrad"] == "gradient nvfp4+sr+h16, activation nvfp4+h16"
    assert variant["rules"][0]["matches"] == {"role": "matmul"}
    assert variant["rules"][-1] == {
        "from": "preset nvfp4_train, rule 2",
        "matches": {"depth": "last:15%"},
        "sets": {"precision": "high"},
        "reason": "among the last 15% of the layers, which training in FP4 needs in high precision",
        "optional": True,
    }


def test_show_toml_is_a_policy_file(run, tmp_path):
    (tmp_path / "resolved.toml").write_text(run("show", "mxfp4", "--toml")[1])
    assert load_policy("resolved.toml") == load_policy("mxfp4")


def test_init_writes_a_file_that_loads(run):
    code, out, _ = run("init")
    assert (code, out) == (0, "wrote policy.toml; next: fp4compile policy check policy.toml\n")
    assert run("check", "policy.toml")[0] == 0
    assert load_policy("policy.toml").choices is not None


def test_every_line_that_init_comments_out_loads_too(run, tmp_path):
    run("init", "mine.toml")
    text = (tmp_path / "mine.toml").read_text()
    live = re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE)
    (tmp_path / "live.toml").write_text(live)
    assert len([rule for rule in load_policy("live.toml").choices.native.rules if not rule.optional]) == 3
    assert load_policy("live.toml").choices.training.training.wgrad is not None


def test_init_overwrites_only_when_told_to(run, tmp_path):
    (tmp_path / "policy.toml").write_text("mine")
    with pytest.raises(FileExists) as refused:
        run("init")
    assert str(refused.value) == "policy.toml exists already. Give another path, or --force to overwrite it."
    assert (tmp_path / "policy.toml").read_text() == "mine"
    assert run("init", "--force")[0] == 0
    assert json.loads(run("init", "other.toml", "--json")[1]) == {"path": "other.toml"}
