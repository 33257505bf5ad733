from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4compile.policy.pattern import compile_pattern, depth_range

DOWN = "model.layers.0.mlp.down_proj"
MATCHES = [
    ("lm_head", "lm_head"),
    ("lm_head", "model.lm_head"),
    ("down_proj", DOWN),
    ("mlp.down_proj", DOWN),
    ("model.layers.*.mlp.down_proj", DOWN),
    ("layers.*.mlp.*", "base_model.model.model.layers.31.mlp.up_proj"),
    ("layers.?.mlp.*", DOWN),
    ("layers.[0-3].mlp.*", DOWN),
    ("layers.[!1-9].mlp.*", DOWN),
    ("*_proj", DOWN),
    ("model.**.down_proj", DOWN),
    ("**.down_proj", DOWN),
    ("layers.0.**", DOWN),
    ("model.layers.0.mlp.down_proj.**", DOWN),
    ("mlp.**.down_proj", DOWN),
    ("**", DOWN),
    ("**", ""),
    ("*", ""),
    ("*", DOWN),
    (r"re:model\.layers\.\d+\.mlp\.(down|up)_proj", DOWN),
    ("a+b.c", "a+b.c"),
]
MISSES = [
    ("lm_head", "lm_head2"),
    ("lm_head", "my_lm_head"),
    ("lm_head", "lm_head.decoder"),
    ("gate", "model.layers.0.mlp.gate_proj"),
    ("model.layers.*.down_proj", DOWN),
    ("layers.1.mlp.*", "model.layers.11.mlp.down_proj"),
    ("layers.?.mlp.*", "model.layers.11.mlp.down_proj"),
    ("layers.[!0].mlp.*", DOWN),
    ("layers[!0]0.mlp.*", DOWN),
    ("layers.0", DOWN),
    ("re:down_proj", DOWN),
    ("re:model", DOWN),
    ("down.proj", DOWN),
    ("downxproj", "down.proj"),
    ("*.lm_head", "lm_head"),
]


@pytest.mark.parametrize(("pattern", "path"), MATCHES)
def test_pattern_matches(pattern, path):
    assert compile_pattern(pattern).fullmatch(path)


@pytest.mark.parametrize(("pattern", "path"), MISSES)
def test_pattern_does_not_match(pattern, path):
    assert not compile_pattern(pattern).fullmatch(path)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", "without empty segments"),
        ("model..mlp", "without empty segments"),
        (".mlp", "without empty segments"),
        ("layers**.mlp", "'**' stands for whole segments"),
        ("layers.[0-3.mlp", "a bracket opens a set"),
        ("layers.[3-0]", "a set of characters"),
        ("re:(", "a regular expression that Python can compile"),
        ("re:a{99999999999999}", "a regular expression that Python can compile"),
    ],
)
def test_bad_pattern_is_refused(pattern, said):
    with pytest.raises(ValueError, match=r".") as refused:
        compile_pattern(pattern)
    assert said in str(refused.value)


@given(st.lists(st.text("ab0_-+()\\^$|", min_size=1), min_size=1, max_size=4))
def test_a_path_without_wildcards_matches_itself_and_any_longer_path_that_ends_in_it(segments):
    pattern = compile_pattern(".".join(segments))
    assert pattern.fullmatch(".".join(segments))
    assert pattern.fullmatch(".".join(["module", *segments]))
    assert not pattern.fullmatch(".".join([*segments, "module"])) or segments[-1] == "module"


@given(st.text("ab.*?[]!-", max_size=8))
def test_no_text_crashes_the_compiler(text):
    with contextlib.suppress(ValueError):
        assert isinstance(compile_pattern(text), re.Pattern)


@pytest.mark.parametrize(
    ("spec", "layers", "positions"),
    [
        ("first:2", 5, [0, 1]),
        ("last:2", 5, [3, 4]),
        ("last:9", 5, [0, 1, 2, 3, 4]),
        ("first:9", 2, [0, 1]),
        ("last:15%", 20, [17, 18, 19]),
        ("last:15%", 3, []),
        ("last:15%", 4, [3]),
        ("last:50%", 5, [2, 3, 4]),
        ("first:12.5%", 8, [0]),
        ("last:100%", 3, [0, 1, 2]),
        ("1..3", 9, [1, 2, 3]),
        ("4", 9, [4]),
        ("-1", 9, [8]),
    ],
)
def test_depth_names_positions(spec, layers, positions):
    assert [i for i in range(layers) if i in depth_range(spec, layers)] == positions


@pytest.mark.parametrize(
    "spec", ["", "last", "last:0", "first:0%", "last:101%", "last:-1", "middle:3", "3..", "5..2", "2-4", "1.5", "last: 4"]
)
def test_bad_depth_is_refused(spec):
    with pytest.raises(ValueError, match="needed"):
        depth_range(spec, 8)
