"""The picture of a real transformed Llama: the right boxes, colours and arrows, equal blocks once, text inside its box."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest
import torch
from torch import fx

from fp4compile.passes.record import GraphRecord, SiteDecision
from fp4compile.passes.site import Role
from fp4compile.report import palette
from fp4compile.report.blocks import Panel, panels_of
from fp4compile.report.boxes import Box, BoxGraph, Kind, condense
from fp4compile.report.picture import draw
from tests.captured_graphs import Mlp, capture_graphs, tiny_llama
from tests.fp4compile.report.transformed_graphs import transform

SVG = "{http://www.w3.org/2000/svg}"
Transformed = tuple[fx.GraphModule, GraphRecord]


@pytest.fixture(scope="module")
def inference() -> Transformed:
    ids = torch.randint(0, 64, (2, 16))
    return transform(capture_graphs(tiny_llama(layers=3).bfloat16(), input_ids=ids)[-1])


@pytest.fixture(scope="module")
def training() -> Transformed:
    """Four layers, of which the policy keeps most of the last in high precision."""
    ids = torch.randint(0, 64, (2, 16))
    captured = capture_graphs(tiny_llama(layers=4).bfloat16(), input_ids=ids, labels=ids, training=True)[-1]
    return transform(captured, "nvfp4_train")


def drawn(record: GraphRecord) -> list[SiteDecision]:
    """What the picture shows: all but what no input reaches: angles of rotary embeddings, a matmul in some releases of transformers."""
    return [row for row in record.sites if row.name != "model.rotary_emb"]


def shown(panel: Panel, title: str) -> list[Box]:
    return [box for section in panel.sections for box in section.boxes if box.title.endswith(title)]


def readers(panel: Panel, box: Box) -> set[str]:
    return {b.module.rsplit(".", 1)[-1] for a, b in panel.edges if a is box}


def test_every_matmul_of_the_graph_is_one_box(inference: Transformed) -> None:
    gm, record = inference
    boxes = condense(gm).boxes
    assert sorted(b.module for b in boxes if b.kind is Kind.MATMUL) == sorted(row.name for row in drawn(record))
    quantizes = [n for n in gm.graph.nodes if str(n.target) == "fp4.quantize.default"]
    weights = [b for b in boxes if b.stored]
    assert sum(b.kind is Kind.QUANTIZE for b in boxes) == len(quantizes) - len(weights) == 4 * 3


def test_boxes_are_few_and_their_graph_has_no_circle(training: Transformed) -> None:
    gm, record = training
    graph = condense(gm)
    assert len(graph.boxes) < len(gm.graph.nodes) / 5
    assert all(a.order < b.order for a, b in graph.edges)
    assert sorted((b.module, b.role) for b in graph.boxes if b.kind is Kind.MATMUL) == sorted((r.name, r.role) for r in drawn(record))


def test_one_block_stands_for_all_equal_ones(inference: Transformed) -> None:
    [panel] = panels_of(condense(inference[0]))
    assert [s.title for s in panel.sections] == ["", "model.layers.{0..2}  x3", ""]
    assert len(shown(panel, "q_proj")) == 1
    [embedding], [first_norm] = shown(panel, "embed_tokens"), shown(panel, "input_layernorm")
    assert (embedding, first_norm) in panel.edges, "what the first layer reads enters the block"
    [down], [last_norm] = shown(panel, "down_proj"), shown(panel, "add, norm")
    assert (down, last_norm) in panel.edges, "what the last layer gives leaves it"
    [sum_in_between] = shown(panel, "post_attention_layernorm")
    assert (embedding, sum_in_between) not in panel.edges, "only the first layer adds the embedding itself"


def test_shared_quantizers_have_several_readers(inference: Transformed) -> None:
    [panel] = panels_of(condense(inference[0]))
    groups = sorted(sorted(readers(panel, box)) for s in panel.sections for box in s.boxes if box.kind is Kind.QUANTIZE)
    assert groups == [["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]]


def test_training_has_a_forward_and_a_backward_panel(training: Transformed) -> None:
    forward, backward = panels_of(condense(training[0]))
    assert (forward.title, backward.title) == ("forward", "backward")
    roles = {b.role for s in backward.sections for b in s.boxes if b.kind is Kind.MATMUL}
    assert roles == {str(Role.DGRAD), str(Role.WGRAD)}
    saved = [b for s in backward.sections for b in s.boxes if b.kind is Kind.SAVED and b.title.startswith("quantize")]
    assert saved, "wgrad reads what the forward quantized"
    later = [b for s in forward.sections for b in s.boxes if "read by the backward" in b.details]
    assert len(later) == len(saved)


def test_layers_that_differ_are_drawn_apart(training: Transformed) -> None:
    forward, backward = panels_of(condense(training[0]))
    titles = [s.title for s in forward.sections if s.title]
    assert titles == ["model.layers.{0..2}  x3", "model.layers.3"]
    assert [s.title for s in backward.sections if s.title] == titles[::-1], "the backward comes to the last layers first"


def test_colours_say_precision(inference: Transformed) -> None:
    [panel] = panels_of(condense(inference[0]))
    assert palette.paint_of(shown(panel, "q_proj")[0]) == palette.W4A4
    assert palette.paint_of(shown(panel, "lm_head")[0]) == palette.HIGH
    assert palette.paint_of(shown(panel, "quantize nvfp4")[0]) == palette.QUANTIZE


def test_weight_only_has_no_quantizer_and_its_own_colour() -> None:
    gm, _ = transform(capture_graphs(Mlp().bfloat16(), torch.randn(4, 32, dtype=torch.bfloat16))[0], "nvfp4_a16")
    graph = condense(gm)
    assert not [b for b in graph.boxes if b.kind is Kind.QUANTIZE]
    matmuls = [b for b in graph.boxes if b.kind is Kind.MATMUL]
    assert {palette.paint_of(b) for b in matmuls} == {palette.W4A16}
    assert {b.weight for b in matmuls} == {"weight nvfp4 64 x 32", "weight nvfp4 32 x 64"}


def test_a_fallback_is_marked() -> None:
    gm, record = transform(capture_graphs(Mlp().bfloat16(), torch.randn(4, 32, dtype=torch.bfloat16))[0])
    name = record.sites[0].name
    drawing = draw(gm, fallbacks=frozenset({(name, "fprop")}))
    assert palette.FELL_BACK.label in drawing.svg
    assert palette.FELL_BACK.label not in draw(gm).svg


def rectangles(root: ET.Element) -> list[tuple[ET.Element, tuple[float, float, float, float]]]:
    """The boxes of the drawing: groups with a tooltip; (left, top, width, height)."""
    groups = [g for g in root.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    return [(g, tuple(float(g.find(f"{SVG}rect").get(k)) for k in ("x", "y", "width", "height"))) for g in groups]  # type: ignore[union-attr, arg-type, misc]


@pytest.mark.parametrize("which", ["inference", "training"])
def test_svg_is_well_formed_and_nothing_overlaps(which: str, request: pytest.FixtureRequest) -> None:
    gm, _ = request.getfixturevalue(which)
    root = ET.fromstring(draw(gm, title="a < b", subtitle=["one & two"]).svg)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    paper = root.find(f"{SVG}rect")
    assert paper is not None
    assert paper.get("fill") == "#ffffff"
    panels = root.findall(f"{SVG}g")
    for panel in panels:
        for (_, a), (_, b) in combinations(rectangles(panel), 2):
            assert a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
        for group, (left, top, w, h) in rectangles(panel):
            for text in group.iter(f"{SVG}text"):
                half = len(text.text or "") * float(text.get("font-size", 0)) * 0.602 / 2  # DejaVu Sans Mono: 1233 of 2048 units
                assert left <= float(text.get("x", 0)) - half
                assert float(text.get("x", 0)) + half <= left + w
                assert top < float(text.get("y", 0)) < top + h
                assert left + w < width
                assert top + h < height


def test_dot_declares_what_it_connects(training: Transformed) -> None:
    dot = draw(training[0], title='with "quotes"').dot
    declared = set(re.findall(r"^    (b\d+_\d+) \[", dot, re.MULTILINE))
    connected = set(re.findall(r"(b\d+_\d+) -> (b\d+_\d+)", dot))
    assert len(connected) > 50
    assert {end for edge in connected for end in edge} <= declared
    assert dot.count("{") - len(re.findall(r"\{[\d.,]+\}", dot)) == dot.count("}") - len(re.findall(r"\{[\d.,]+\}", dot))
    assert r"with \"quotes\"" in dot


def test_the_same_graph_gives_the_same_picture() -> None:
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    first, second = (draw(transform(capture_graphs(Mlp().bfloat16(), x, training=True)[0], "nvfp4_train")[0]) for _ in range(2))
    assert first == second


def test_a_graph_without_matmuls_is_drawn_too() -> None:
    gm, _ = transform(capture_graphs(lambda x: x.sin() + 1, torch.randn(4, 4))[0])
    graph = condense(gm)
    assert [b.kind for b in graph.boxes] == [Kind.INPUT, Kind.OTHER, Kind.OUTPUT]
    assert graph == BoxGraph(boxes=graph.boxes, edges=frozenset(zip(graph.boxes, graph.boxes[1:], strict=False)))
    ET.fromstring(draw(gm).svg)


def test_weights_are_strips_of_every_role_that_reads_them(training: Transformed) -> None:
    boxes = condense(training[0]).boxes
    q = {b.role: b for b in boxes if b.module == "model.layers.0.self_attn.q_proj" and b.kind is Kind.MATMUL}
    assert q["fprop"].weight == q["dgrad"].weight == "weight nvfp4+16x16 32 x 32"
    assert q["wgrad"].weight == ""
