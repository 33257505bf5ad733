"""The report tells the truth about its records: counts, shares, causes, and nothing lost when equal layers are written once."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4compile.passes.record import GraphRecord, PassRecord, SiteDecision
from fp4compile.report.folding import Folded, fold, number_range
from fp4compile.report.render import byte_text
from fp4compile.report.report import Report


def row(name: str, *, role: str = "fprop", m: str = "16", n: str = "32", k: str = "64", **changes: object) -> SiteDecision:
    fields: dict[str, object] = {
        "name": name, "role": role, "op": "mm", "m": m, "n": n, "k": k, "precision": "nvfp4 W4A4", "rule": "preset nvfp4, [default]",
        "reason": "default of preset nvfp4", "kernel": "cpu", "bytes_before": 4096, "bytes_after": 1156,
    }  # fmt: skip
    return SiteDecision(**{**fields, **changes})  # type: ignore[arg-type]


def kept(name: str, reason: str = "output head", **changes: object) -> SiteDecision:
    fields: dict[str, object] = {"precision": "bfloat16", "rule": "preset nvfp4, rule 2", "kernel": "", "bytes_after": 4096}
    return row(name, **{**fields, "reason": reason, **changes})  # type: ignore[arg-type]


def graph(*rows: SiteDecision, id: str = "0/0", **changes: object) -> GraphRecord:
    fields: dict[str, object] = {"id": id, "training": False, "target": "cpu", "policy": "nvfp4", "sites": list(rows)}
    return GraphRecord(**{**fields, **changes})  # type: ignore[arg-type]


LAYERS = [row(f"model.layers.{i}.mlp.{p}_proj", n=n) for i in range(30) for p, n in (("up", "128"), ("down", "32"))]


def test_coverage_counts_and_shares() -> None:
    broken = kept("b", "K = 0 is no block", fallback=True, k="32")
    report = Report.of([graph(row("a"), kept("lm_head", n="96"), broken)])
    cover = report.coverage
    assert (cover.sites, cover.quantized, cover.kept, cover.fallen_back) == (3, 1, 1, 1)
    # 16 * 64 * 32 of 16 * 64 * 32 + 16 * 64 * 96 + 16 * 32 * 32
    assert cover.flops_share == pytest.approx(1 / (1 + 3 + 0.5))
    assert cover.weight_share == pytest.approx(1 / 3)
    assert (cover.bytes_before, cover.bytes_after) == (3 * 4096, 1156 + 2 * 4096)


def test_symbolic_tokens_cancel_in_the_share_of_operations() -> None:
    static = Report.of([graph(row("a"), kept("b", n="96"))]).coverage.flops_share
    dynamic = Report.of([graph(row("a", m="s27*s52"), kept("b", m="s27*s52", n="96"))]).coverage.flops_share
    assert dynamic == static == pytest.approx(0.25)


def test_share_of_operations_is_unknown_rather_than_wrong() -> None:
    attention = kept("scores", m="s27", n="s27", bytes_before=0, bytes_after=0)
    assert Report.of([graph(row("a", m="s27"), attention)]).coverage.flops_share is None
    odd = row("a", m="(s27//2) + 1")
    assert Report.of([graph(odd)]).coverage.flops_share is None


def test_weights_of_a_recompiled_frame_count_once() -> None:
    twice = Report.of([graph(row("a"), id="0/0"), graph(row("a", m="1"), id="0/1")])
    assert twice.coverage.sites == 2
    assert twice.coverage.bytes_before == 4096
    other_frame = Report.of([graph(row("a"), id="0/0"), graph(row("a"), id="1/0")])
    assert other_frame.coverage.bytes_before == 2 * 4096


def test_fallbacks_are_grouped_by_reason_with_the_frequent_first() -> None:
    rows = [kept("a", "no kernel", fallback=True), *(kept(n, "dtype float64", fallback=True) for n in "bc"), kept("d", "output head")]
    found = Report.of([graph(*rows)]).fallbacks
    assert [(f.reason, f.count, f.sites) for f in found] == [("dtype float64", 2, ("b", "c")), ("no kernel", 1, ("a",))]


def test_table_folds_layers_and_can_show_each() -> None:
    report = Report.of([graph(*LAYERS, kept("lm_head"))])
    folded, full = report.to_table(), report.to_table(folded=False)
    assert "model.layers.{0..29}.mlp.up_proj x30" in folded
    assert len([line for line in folded.splitlines() if "_proj" in line]) == 2
    assert len([line for line in full.splitlines() if "_proj" in line]) == 60
    assert str(report) == folded


def test_header_says_what_happened() -> None:
    record = graph(
        *LAYERS, kept("lm_head"), kept("x", "dtype float64", fallback=True, bytes_before=0), shared=12, freed_bytes=3_000_000,
        passes=[PassRecord(name="a", changed=1, notes=(), milliseconds=3.4), PassRecord(name="b", changed=0, notes=(), milliseconds=5.2)],
        dump="out/graph_0_0_inference",
    )  # fmt: skip
    head = Report.of([record]).to_table().split("\n\n")[0].splitlines()
    assert head[0] == "graph 0/0: inference on cpu, policy nvfp4"
    assert head[1].startswith("  62 matmuls: 60 quantized, 1 kept, 1 fell back (")
    # 61 weights of 4096 bytes; 60 of them become 1156 bytes
    assert head[2] == "  matmul weights 250 kB -> 73.5 kB (3.40x smaller), originals of 3 MB freed, 12 quantizations shared"
    assert head[3:] == [
        "  2 passes in 9 ms",
        "  kept in bfloat16: 1 x output head",
        "  fell back in bfloat16: 1 x dtype float64",
        "  dump in out/graph_0_0_inference",
    ]


def test_a_fallback_is_loud_in_its_row() -> None:
    table = Report.of([graph(kept("a", "dtype float64 is not float32", fallback=True))]).to_table()
    assert "FELL BACK: dtype float64 is not float32 (preset nvfp4, rule 2)" in table


def test_roles_of_one_layer_share_a_row_when_treated_alike() -> None:
    rows = [row("up", role=r, rule=f"preset nvfp4_train, [training] {r}") for r in ("fprop", "wgrad", "dgrad")]
    [one] = fold(rows)
    assert one.roles == ("fprop", "dgrad", "wgrad")
    assert "preset nvfp4_train, [training]" in Report.of([graph(*rows)]).to_table().splitlines()[-1]
    assert len(fold([*rows[:2], kept("up", role="dgrad")])) == 2


def test_json_holds_everything_and_can_be_stable() -> None:
    passes = [PassRecord(name="normalize", changed=2, notes=("one note",), milliseconds=1.5)]
    report = Report.of([graph(row("a"), kept("b", fallback=True), passes=passes, dump="somewhere")])
    full, stable = json.loads(report.to_json()), json.loads(report.to_json(stable=True))
    assert full["graphs"][0]["passes"][0]["milliseconds"] == 1.5
    assert full["graphs"][0]["dump"] == "somewhere"
    assert full["coverage"]["fallen_back"] == 1
    assert full["fallbacks"][0]["sites"] == ["b"]
    assert full["graphs"][0]["sites"][0]["k"] == "64"
    assert stable["graphs"][0]["passes"] == [{"name": "normalize", "changed": 2, "notes": ["one note"]}]
    assert "dump" not in stable["graphs"][0]


def test_markdown_is_a_pipe_table_without_times_when_stable() -> None:
    record = graph(*LAYERS, passes=[PassRecord(name="a", changed=1, notes=(), milliseconds=3.4)])
    text = Report.of([record]).to_markdown(stable=True)
    assert text.startswith("## graph 0/0: inference on cpu, policy nvfp4\n\n- 60 matmuls")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 4
    assert " ms" not in text
    assert " ms" in Report.of([record]).to_markdown()


def test_nothing_compiled_and_nothing_to_do_are_said() -> None:
    assert "No graph compiled" in Report.of([]).to_table()
    assert "nothing to do" in Report.of([graph()]).to_table()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (59392, "59.4 kB"), (999_600, "1 MB"), (346_000_000, "346 MB"), (7 * 10**12, "7 TB")],
)
def test_bytes_as_text(count: int, text: str) -> None:
    assert byte_text(count) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([7], "7"), ([0, 1, 2], "{0..2}"), ([5, 3], "{3,5}"), ([0, 1, 2, 7, 9, 10], "{0..2,7,9..10}")],
)
def test_number_ranges(numbers: list[int], text: str) -> None:
    assert number_range(numbers) == text


def expand(name: str) -> list[str]:
    """What a shell would make of the braces."""
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [[p] if i % 2 == 0 else [str(n) for piece in p.split(",") for n in numbers(piece)] for i, p in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def numbers(piece: str) -> range:
    first, _, last = piece.partition("..")
    return range(int(first), int(last or first) + 1)


def folded_sites(rows: list[Folded]) -> list[tuple[str, str, str]]:
    return sorted((name, role, f.row.precision) for f in rows for name in expand(f.name) for role in f.roles)


SITE = st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from(["w1", "w2"]), st.sampled_from(["fprop", "dgrad"]))


@given(st.sets(SITE, max_size=40), st.sets(st.integers(0, 4)))
def test_folding_neither_loses_nor_invents_a_site(sites: set[tuple[int, int, str, str]], high: set[int]) -> None:
    """Whatever subset of experts and layers is there, expanding the folded names gives the sites back."""
    rows = [
        (kept if layer in high else row)(f"layers.{layer}.experts.{expert}.{leaf}", role=role)
        for layer, expert, leaf, role in sorted(sites)
    ]
    folded = fold(rows)
    assert folded_sites(folded) == sorted((r.name, r.role, r.precision) for r in rows)
    assert sum(f.count * len(f.roles) for f in folded) == len(rows)


def test_experts_fold_over_both_numbers() -> None:
    rows = [row(f"model.layers.{i}.experts.{e}.w1") for i in range(3) for e in range(8)]
    assert [(f.name, f.count) for f in fold(rows)] == [("model.layers.{0..2}.experts.{0..7}.w1", 24)]


def test_training_says_what_share_each_reason_keeps_in_high_precision() -> None:
    late = [kept(f"layers.{i}.up", "among the last layers", n="128") for i in (6, 7)]
    head = Report.of([graph(*LAYERS, *late, training=True)]).to_table()
    # 2 * 128 of 30 * (128 + 32) + 2 * 128 columns; 2 of 62 weights
    assert "2 x among the last layers (5.0% of operations, 3.2% of weight bytes)" in head
