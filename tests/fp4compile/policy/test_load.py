"""Where policies come from, how files extend each other, and what each malformed file is told."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fp4compile.codegen.errors import Fp4CompileError, UnknownName
from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.load import CircularExtends, InvalidToml, NothingToStartFrom, UnreadablePolicy, load_policy
from fp4compile.policy.reading import WrongValue
from tests.fp4compile.policy.sites import llama, site

A, W, G = OperandKind.ACTIVATION, OperandKind.WEIGHT, OperandKind.GRADIENT


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if "version" in text else f"version = 1\n{text}", encoding="utf-8")
        return path

    return write_file


def refusal(kind: type[Fp4CompileError], source) -> str:
    with pytest.raises(kind) as refused:
        load_policy(source)
    return str(refused.value)


def test_sources_are_a_preset_a_path_a_mapping_or_a_policy(write, tmp_path, monkeypatch):
    text = 'extends = "nvfp4"\n[[rule]]\nmatch = "q_proj"\nprecision = "high"\n'
    path = write("mine.toml", text)
    from_path = load_policy(path)
    assert load_policy(str(path)) == from_path
    assert load_policy(from_path) is from_path
    assert from_path.name == "mine.toml"
    monkeypatch.chdir(tmp_path)
    assert load_policy("mine.toml") == from_path
    from_mapping = load_policy(tomllib.loads(path.read_text()))
    assert from_mapping.name == "inline policy"
    assert [r.match for r in from_mapping.rules] == [r.match for r in from_path.rules]


def test_a_file_may_be_written_by_an_editor_on_windows(write, tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b'\xef\xbb\xbfversion = 1\r\nextends = "nvfp4"\r\n')
    assert load_policy(path).rules == load_policy("nvfp4").rules


def test_a_name_that_is_neither_preset_nor_file():
    assert refusal(UnknownName, "nvfp4_a61") == (
        "unknown policy (no preset has this name and no such file exists) 'nvfp4_a61'. Did you mean 'nvfp4_a16'? "
        "Valid: auto, bf16, mxfp4, mxfp4_a16, nvfp4, nvfp4_a16, nvfp4_accurate, nvfp4_train."
    )


def test_a_file_to_extend_that_does_not_exist(write):
    path = write("a.toml", 'extends = "gone/base.toml"')
    assert "no such file exists) 'gone/base.toml'" in refusal(UnknownName, path)


def test_files_extend_files_relative_to_themselves(write):
    write("shared/base.toml", 'extends = "house/nvfp4ish.toml"\n[[rule]]\nmatch = "q_proj"\nprecision = "high"\n')
    write(
        "shared/house/nvfp4ish.toml",
        'extends = "nvfp4"\n[default]\nactivation = { global_scale = "row" }\nweight = { scale_rule = "four_over_six" }\n',
    )
    path = write("mine.toml", 'extends = "shared/base.toml"\n[[rule]]\nmatch = "k_proj"\nprecision = "w4a16"\n')
    q, k, v = load_policy(path).decide([site("q_proj"), site("k_proj"), site("v_proj")], training=False)
    assert (q.configs, q.rule) == ({}, "shared/base.toml, rule 1")
    assert (k.configs, k.rule) == ({W: QuantConfig(scale_rule="four_over_six")}, "mine.toml, rule 1")
    assert v.configs == {A: QuantConfig(global_scale="row"), W: QuantConfig(scale_rule="four_over_six")}
    assert v.rule == "shared/house/nvfp4ish.toml, [default]"


def test_a_circle_of_files(write):
    write("b.toml", 'extends = "c.toml"')
    write("c.toml", 'extends = "./b.toml"')
    path = write("a.toml", 'extends = "b.toml"')
    assert refusal(CircularExtends, path) == (
        "policy files extend each other in a circle: b.toml -> c.toml -> b.toml. Let one of them extend a preset."
    )


def test_a_file_that_extends_itself(write):
    assert "a.toml -> a.toml" in refusal(CircularExtends, write("a.toml", 'extends = "a.toml"'))


def test_a_file_without_a_start(write):
    said = refusal(NothingToStartFrom, write("a.toml", '[[rule]]\nmatch = "q_proj"\nprecision = "high"\n'))
    assert said.startswith("a.toml: nothing says what a matmul gets that no rule matches. Write extends = ")


def test_a_file_may_start_from_its_own_default(write):
    policy = load_policy(write("a.toml", '[default]\nprecision = "w4a4"\n'))
    assert policy.base == {A: QuantConfig(), W: QuantConfig()}
    assert policy.rules == ()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("version = 1\nextends = nvfp4\n", "2:11"),
        ("version = 1\n[[rule]\n", "2:7"),
        ('version = 1\nname = "', "2:9"),
        ("version = 1\nversion = 1\n", "2:12"),
        ("version = " + "1" * 5000, "1:5011"),
    ],
)
def test_text_that_is_no_toml_names_line_and_column(write, text, place):
    said = refusal(InvalidToml, write("a.toml", text))
    assert re.fullmatch(
        rf"a\.toml:{place}: .+[^.]\. Policy files are TOML: see https://toml.io, or start from `fp4compile policy init`.", said
    )


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    assert refusal(UnreadablePolicy, tmp_path / "latin.toml").startswith("policy file latin.toml cannot be read: byte 5 is not UTF-8.")
    assert "Is a directory" in refusal(UnreadablePolicy, tmp_path)
    assert "null" in refusal(UnreadablePolicy, "a\0b")


RULE = '[[rule]]\nmatch = "q_proj"\n'
UNKNOWN = [
    ("versoin = 1\nversion = 1", "unknown key 'versoin' in a.toml. Did you mean 'version'?"),
    ('unmatched = "warning"', "unknown unmatched 'warning' in a.toml. Did you mean 'warn'? Valid: error, warn."),
    ("[auto]\nnative = 'nvfp4'", "unknown key 'auto' in a.toml."),
    ("[default]\nactivations = {}", "unknown key 'activations' in a.toml, [default]. Did you mean 'activation'?"),
    (
        "[default]\nprecision = 'w4a8'",
        "unknown precision 'w4a8' in a.toml, [default]. Did you mean 'w4a4'? Valid: bf16, dequantized, high, w4a16, w4a4.",
    ),
    (
        "[default]\nformat = 'nvfp8'",
        "unknown format 'nvfp8' in a.toml, [default]. Did you mean 'nvfp4'? Valid: if4, mixfp4, mxfp4, nvfp4, nvint4.",
    ),
    (f"{RULE}precission = 'high'", "unknown key 'precission' in a.toml, rule 1. Did you mean 'precision'?"),
    (f"{RULE}precision = 'high'\n[[rule]]\nmatch = 'a'\nrolle = 'fprop'", "unknown key 'rolle' in a.toml, rule 2. Did you mean 'role'?"),
    (f"{RULE}weight = {{ scale_rul = 'amax' }}", "unknown key 'scale_rul' in a.toml, rule 1, weight. Did you mean 'scale_rule'?"),
    (
        f"{RULE}weight = {{ scale_rule = 'four_over_6' }}",
        "unknown scale_rule 'four_over_6' in a.toml, rule 1, weight. Did you mean 'four_over_six'?",
    ),
    (f"{RULE}weight = {{ block = '16' }}", "unknown block '16' in a.toml, rule 1, weight. Did you mean '1x16'? Valid: 16x16, 1x16, 1x32."),
    (f"{RULE}weight = {{ rounding = 'sr' }}", "unknown rounding 'sr' in a.toml, rule 1, weight. Valid: eden, gptq, nearest, stochastic."),
    (f"{RULE}role = ['fprop', 'dgrda']\nprecision = 'high'", "unknown role 'dgrda' in a.toml, rule 1. Did you mean 'dgrad'?"),
    (f"{RULE}op = 'aten.bmmm'\nprecision = 'high'", "unknown op 'bmmm' in a.toml, rule 1. Did you mean 'bmm'?"),
    (f"{RULE}trait = 'tide'\nprecision = 'high'", "unknown trait 'tide' in a.toml, rule 1. Did you mean 'tied'?"),
    (f"{RULE}graph = 'train'\nprecision = 'high'", "unknown graph 'train' in a.toml, rule 1. Did you mean 'training'?"),
    ("[training]\nwgrd = 'high'", "unknown key 'wgrd' in a.toml, [training]. Did you mean 'wgrad'? Valid: backward, dgrad, fprop, wgrad."),
    ("[training]\nwgrad = { weight = {} }", "unknown key 'weight' in a.toml, [training] wgrad."),
    ("[training]\nwgrad = 'hihg'", "unknown precision 'hihg' in a.toml, [training] wgrad. Did you mean 'high'?"),
    ("[[schedule]]\nfrom_stpe = 3", "unknown key 'from_stpe' in a.toml, schedule 1. Did you mean 'from_step'?"),
    ("[[schedule]]\nfrom_step = 3\nfprop = 'bf61'", "unknown precision 'bf61' in a.toml, schedule 1 fprop. Did you mean 'bf16'?"),
]


@pytest.mark.parametrize(("text", "said"), UNKNOWN)
def test_an_unknown_name_gets_its_place_and_the_nearest_valid_one(write, text, said):
    assert refusal(UnknownName, write("a.toml", f'extends = "nvfp4"\n{text}\n')).startswith(said)


WRONG = [
    (f"{RULE}", "a.toml, rule 1: rule = {'match': 'q_proj'}; a key that sets something is needed"),
    ("[[rule]]\nprecision = 'high'", "a.toml, rule 1: rule = {'precision': 'high'}; a key that matches is needed, as match = \"**\"."),
    ("[rule]\nmatch = 'a'", "a.toml: rule = {'match': 'a'}; tables in double brackets are needed: [[rule]]."),
    ("[[rule]]\nmatch = 3\nprecision = 'high'", "a.toml, rule 1: match = 3; a text or a list of texts is needed."),
    ("[[rule]]\nmatch = []\nprecision = 'high'", "a.toml, rule 1: match = []; a text or a list of texts is needed."),
    (
        "[[rule]]\nmatch = 're:('\nprecision = 'high'",
        "a.toml, rule 1: match = 're:('; a regular expression that Python can compile is needed",
    ),
    ("[[rule]]\nmatch = 'a**'\nprecision = 'high'", "a.toml, rule 1: match = 'a**'; '**' stands for whole segments; use '*' inside one."),
    ("[[rule]]\nclass = 'Lin.'\nprecision = 'high'", "a.toml, rule 1: class = 'Lin.'; a pattern without empty segments is needed"),
    ("[[rule]]\ndepth = 'last:none'\nprecision = 'high'", 'a.toml, rule 1: depth = \'last:none\'; "first:N", "last:N", '),
    ("[[rule]]\ndepth = true\nprecision = 'high'", "a.toml, rule 1: depth = True; "),
    ("[[rule]]\nmin_k = -1\nprecision = 'high'", "a.toml, rule 1: min_k = -1; a whole number from 0 on is needed."),
    ("[[rule]]\nmin_k = 64\nmax_k = 32\nprecision = 'high'", "a.toml, rule 1: min_k = 64; it must not be above max_k = 32."),
    (f"{RULE}precision = 'high'\noptional = 1", "a.toml, rule 1: optional = 1; true or false is needed."),
    (f"{RULE}precision = 'high'\norigin = 'me'", "a.toml, rule 1: origin = 'me'; one such as \"preset nvfp4, rule 2\" is needed."),
    (f"{RULE}precision = 'high'\nreason = ''", "a.toml, rule 1: reason = ''; a text is needed."),
    (f"{RULE}weight = 'nvfp4'", "a.toml, rule 1: weight = 'nvfp4'; a table is needed, as in"),
    (f"{RULE}weight = {{}}", "a.toml, rule 1, weight: table = {}; a field is needed, as in"),
    (f"{RULE}hadamard = 8", "a.toml, rule 1: hadamard = 8; one of 0, 16, 32, 64, 128 is needed."),
    (f"{RULE}weight = {{ hadamard = true }}", "a.toml, rule 1, weight: hadamard = True; one of 0, 16, 32, 64, 128 is needed."),
    (f"{RULE}weight = {{ static_amax = inf }}", "a.toml, rule 1, weight: static_amax = inf; a positive finite number is needed."),
    ("[training]\nwgrad = {}", 'a.toml, [training] wgrad: wgrad = {}; a setting is needed, as in precision = "w4a4".'),
    ("training = 'yes'", "a.toml: training = 'yes'; a table is needed"),
    ("version = 2", "a.toml: version = 2; this release reads version = 1."),
    ("[[schedule]]\nfprop = 'bf16'", "a.toml, schedule 1: from_step = None; its first step is needed, as in from_step = 90_000."),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_wrong_value_gets_its_place_and_what_is_needed(write, text, said):
    head = "" if text.startswith(("training", "version")) else 'extends = "nvfp4"\n'
    assert refusal(WrongValue, write("a.toml", f"{head}{text}\n")).startswith(said)


def test_a_file_without_version(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "nvfp4"')
    assert refusal(WrongValue, tmp_path / "a.toml") == "a.toml: version = None; this release reads version = 1."


LONG = r"""
version = 1
description = "quotes \" and \\ and \u007f and \u20ac"
extends = "nvfp4_train"
unmatched = "warn"

[default]
activation = { global_scale = "static", static_amax = 1e-5 }

[training]
dgrad = "high"
wgrad = { hadamard = 64, format = "nvfp4" }

[[rule]]
match = ["q_proj", 're:.*\.k_proj']
role = ["fprop", "wgrad"]
op = ["aten.mm", "addmm"]
class = "*Linear"
trait = ["tied", "attention"]
depth = -3
min_m = 1
max_n = 100
graph = "training"
activation = { global_scale = "tensor", scale_rule = "four_over_six_mae" }
reason = 'why "so"'

[[rule]]
depth = "last:12.5%"
format = "mxfp4"
optional = true
"""


def test_the_resolved_text_of_a_file_reads_back_to_an_equal_policy(write, tmp_path):
    policy = load_policy(write("long.toml", LONG))
    (tmp_path / "resolved.toml").write_text(policy.to_toml(), encoding="utf-8")
    again = load_policy(tmp_path / "resolved.toml")
    assert again == policy
    assert again.to_toml() == policy.to_toml()


def test_what_extends_auto_reads_back_too(write, tmp_path):
    policy = load_policy(write("mine.toml", LONG.replace("nvfp4_train", "auto").replace("mxfp4", "nvfp4")))
    (tmp_path / "resolved.toml").write_text(policy.to_toml(), encoding="utf-8")
    assert load_policy(tmp_path / "resolved.toml") == policy
    assert [p.name for p in policy.choices.all] == [f"mine.toml (auto -> {p})" for p in ("nvfp4", "nvfp4_a16", "nvfp4_train")]


def test_rules_over_auto_hold_whatever_the_device(write):
    path = write(
        "mine.toml", 'extends = "auto"\n[[rule]]\nmatch = "lm_head"\nprecision = "w4a16"\n[[rule]]\nmatch = "q_proj"\nprecision = "high"\n'
    )
    for policy in load_policy(path).choices.all:
        decided = {s.name: d for s, d in zip(llama(), policy.decide(llama(), training=False), strict=True)}
        assert set(decided["lm_head"].configs) == {W}
        assert decided["lm_head"].rule == "mine.toml, rule 1"
        assert decided["model.layers.0.self_attn.q_proj"].configs == {}


def test_training_tables_are_inherited_field_by_field(write):
    path = write("mine.toml", 'extends = "nvfp4_train"\n[training]\nwgrad = { hadamard = 0 }\ndgrad = "high"\n')
    dgrad, wgrad = load_policy(path).decide([site("up", r, layers=20) for r in (Role.DGRAD, Role.WGRAD)], training=True)
    assert wgrad.configs == {G: QuantConfig(rounding="stochastic"), A: QuantConfig()}
    assert (dgrad.configs, dgrad.reason) == ({}, "backward in high precision (straight-through): [training] keeps dgrad")


def test_another_format_drops_what_belongs_to_the_old_one(write):
    path = write("mine.toml", 'extends = "nvfp4_train"\n[default]\nformat = "mxfp4"\n')
    policy = load_policy(path)
    assert policy.base == {A: QuantConfig(format="mxfp4"), W: QuantConfig(format="mxfp4")}
    wgrad = policy.decide([site("up", Role.WGRAD, layers=20)], training=True)[0]
    assert wgrad.configs[G] == QuantConfig(format="mxfp4", rounding="stochastic", hadamard=16)
