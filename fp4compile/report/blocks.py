"""Draw one block of a model that repeats it: thirty equal layers become one, marked `x30`, and forward and backward become two drawings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fp4compile.report.boxes import Box, BoxGraph, Kind
from fp4compile.report.folding import number_range


@dataclass(frozen=True, kw_only=True)
class Section:
    """Boxes that are drawn below those of the section before. With a path they are one block of the model, in a frame."""

    boxes: tuple[Box, ...]
    path: str = ""  # "model.layers"
    numbers: tuple[int, ...] = ()  # of all layers that look like this one

    @property
    def title(self) -> str:
        """`model.layers.{0..29} x30`"""
        times = f"  x{len(self.numbers)}" if len(self.numbers) > 1 else ""
        return f"{self.path}.{number_range(self.numbers)}{times}" if self.path else ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing: an inference graph, or the forward or the backward of a training graph."""

    title: str
    sections: tuple[Section, ...]
    edges: frozenset[tuple[Box, Box]]


Layer = tuple[str, int]  # ("model.layers", 7)


def panels_of(graph: BoxGraph) -> tuple[Panel, ...]:
    """The drawings of `graph`, repeated blocks drawn once."""
    if not any(box.backward for box in graph.boxes):
        return (_panel("", graph),)
    return _panel("forward", _forward(graph)), _panel("backward", _backward(graph))


def _forward(graph: BoxGraph) -> BoxGraph:
    """The forward boxes; quantizers that serve the backward say so, since their reader is not in the drawing."""
    read_later = {a for a, b in graph.edges if b.backward and a.kind is Kind.QUANTIZE}
    shown = {b: replace(b, details=(*b.details, "read by the backward")) if b in read_later else b for b in graph.boxes if not b.backward}
    return BoxGraph(boxes=tuple(shown.values()), edges=frozenset((shown[a], shown[b]) for a, b in graph.edges if a in shown and b in shown))


def _backward(graph: BoxGraph) -> BoxGraph:
    """The backward boxes, with a stub for each value of the forward that their matmuls read."""
    stubs: dict[Box, Box] = {}
    edges = set()
    for a, b in graph.edges:
        if b.backward and (a.backward or b.kind is Kind.MATMUL):
            source = a if a.backward else stubs.setdefault(a, replace(a, kind=Kind.SAVED))
            edges.add((source, b))
    boxes = [*stubs.values(), *(b for b in graph.boxes if b.backward)]
    return BoxGraph(boxes=tuple(sorted(boxes, key=lambda b: b.order)), edges=frozenset(edges))


def _panel(title: str, graph: BoxGraph) -> Panel:
    layers = _layers(graph)
    keys = _keys(graph, layers)
    classes = _classes(graph, layers, keys)
    shown = _shown(graph, layers, keys, classes)
    edges = _shown_edges(graph, layers, shown, classes)
    used = {box for edge in edges for box in edge} | {b for b in shown.values() if b is not None and b.kind is Kind.MATMUL}
    sections = _sections(sorted(used, key=lambda b: b.order), edges, layers, classes)
    place = {box: i for i, section in enumerate(sections) for box in section.boxes}
    return Panel(title=title, sections=sections, edges=frozenset((a, b) for a, b in edges if place[a] <= place[b]))


def _layers(graph: BoxGraph) -> dict[Box, Layer]:
    """The repeated block that each box is part of: its module path up to the first number that takes several values.

    A quantizer stands in the layer of its readers, and in none where layers share it.
    """
    values: dict[str, set[int]] = {}
    for box in graph.boxes:
        for prefix, index in _numbers(box.module):
            values.setdefault(prefix, set()).add(index)
    found: dict[Box, Layer] = {}
    for box in graph.boxes:
        repeated = [layer for layer in _numbers(box.module) if len(values[layer[0]]) > 1]
        if repeated:
            found[box] = repeated[0]
    read_in: dict[Box, set[Layer | None]] = {}
    for a, b in graph.edges:
        read_in.setdefault(a, set()).add(found.get(b))
    shared = [box for box in found if box.kind in (Kind.QUANTIZE, Kind.ROTATE, Kind.SAVED) and len(read_in.get(box, ())) > 1]
    return {box: layer for box, layer in found.items() if box not in shared}


def _numbers(path: str) -> list[Layer]:
    parts = path.split(".")
    return [(".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdecimal()]


def relative_path(box: Box, layer: Layer | None) -> str:
    """Module path below the layer: `self_attn.q_proj`."""
    return box.module.removeprefix(f"{layer[0]}.{layer[1]}").strip(".") if layer else box.module


def _keys(graph: BoxGraph, layers: dict[Box, Layer]) -> dict[Box, tuple[object, ...]]:
    """What makes a box the same in every layer. Small operators differ at the ends of a model, so they count by their neighbours."""
    seen: Counter[tuple[object, ...]] = Counter()
    keys: dict[Box, tuple[object, ...]] = {}
    for box, layer in layers.items():
        if box.kind is not Kind.OTHER:
            where = "" if box.kind is Kind.QUANTIZE else relative_path(box, layer)
            key = (box.kind, where, box.role, box.details, box.precision, box.weight, box.fell_back)
            seen[layer, key] += 1
            keys[box] = (*key, seen[layer, key])
    around: dict[Box, tuple[set[Box], set[Box]]] = {box: (set(), set()) for box in layers}
    for a, b in graph.edges:
        if a in layers and layers.get(b) == layers[a]:
            around[a][1].add(b)
            around[b][0].add(a)
    for box in layers:
        if box.kind is Kind.OTHER:
            reads, readers = (frozenset(keys[n] for n in near if n.kind is not Kind.OTHER) for near in around[box])
            keys[box] = (box.kind, reads, readers) if reads or readers else (box.kind, box.title)
    return keys


def _classes(graph: BoxGraph, layers: dict[Box, Layer], keys: dict[Box, tuple[object, ...]]) -> dict[Layer, tuple[Layer, ...]]:
    """Layers that look alike, for each layer. Its representative is the one in the middle: the ends of a model are special."""
    contents: dict[Layer, Counter[object]] = {}
    for box, layer in layers.items():
        contents.setdefault(layer, Counter()).update([keys[box]] if box.kind is not Kind.OTHER else [])
    alike: dict[object, list[Layer]] = {}
    for layer, content in contents.items():
        alike.setdefault((layer[0], frozenset(content.items())), []).append(layer)
    return {layer: tuple(sorted(members)) for members in alike.values() for layer in members}


def _representative(members: tuple[Layer, ...]) -> Layer:
    return members[len(members) // 2]


def _shown(
    graph: BoxGraph, layers: dict[Box, Layer], keys: dict[Box, tuple[object, ...]], classes: dict[Layer, tuple[Layer, ...]]
) -> dict[Box, Box | None]:
    """The box that stands for each box; None where the representative has no such box."""
    by_key = {(layer, keys[box]): box for box, layer in layers.items()}
    return {box: by_key.get((_representative(classes[layers[box]]), keys[box])) if box in layers else box for box in graph.boxes}


def _shown_edges(
    graph: BoxGraph, layers: dict[Box, Layer], shown: dict[Box, Box | None], classes: dict[Layer, tuple[Layer, ...]]
) -> set[tuple[Box, Box]]:
    """Edges between shown boxes. Those from one layer to the next equal one would lead back into the block, and are left out.

    Other layers speak for the shown one where it is fed by, or feeds, its like: the first layer reads what comes before the block.
    """
    joining = [(a, b) for a, b in graph.edges if _joins_equal_layers(a, b, layers, classes)]
    fed_by_its_like, feeds_its_like = {shown[b] for _, b in joining}, {shown[a] for a, _ in joining}
    edges: set[tuple[Box, Box]] = set()
    for a, b in graph.edges:
        first, second = shown[a], shown[b]
        if first is None or second is None or first.order >= second.order or _joins_equal_layers(a, b, layers, classes):
            continue
        if b.kind is Kind.OUTPUT and a in layers:
            continue  # a cache that every layer returns would be drawn as one arrow past all that follows
        enters_elsewhere = layers.get(a) != layers.get(b) and second is not b and second not in fed_by_its_like
        leaves_elsewhere = layers.get(a) != layers.get(b) and first is not a and first not in feeds_its_like
        if not enters_elsewhere and not leaves_elsewhere:
            edges.add((first, second))
    return edges


def _joins_equal_layers(a: Box, b: Box, layers: dict[Box, Layer], classes: dict[Layer, tuple[Layer, ...]]) -> bool:
    here, there = layers.get(a), layers.get(b)
    return here is not None and there is not None and here != there and classes[here] == classes[there]


def _sections(
    boxes: list[Box], edges: Iterable[tuple[Box, Box]], layers: dict[Box, Layer], classes: dict[Layer, tuple[Layer, ...]]
) -> tuple[Section, ...]:
    """Blocks in the order in which they end, and between them what belongs to none."""
    ends = {classes[layers[b]]: b.order for b in boxes if b in layers}
    blocks = sorted(ends, key=ends.__getitem__)
    place = {members: 2 * i + 1 for i, members in enumerate(blocks)}
    read: dict[Box, list[Box]] = {}
    for a, b in edges:
        read.setdefault(b, []).append(a)
    where: dict[Box, int] = {}
    for box in boxes:
        if box in layers:
            where[box] = place[classes[layers[box]]]
        else:
            where[box] = max((where[s] + where[s] % 2 for s in read.get(box, ())), default=0)
    sections = []
    for i in range(2 * len(blocks) + 1):
        members = tuple(b for b in boxes if where[b] == i)
        if members and i % 2:
            equal = blocks[i // 2]
            sections.append(Section(boxes=members, path=equal[0][0], numbers=tuple(n for _, n in equal)))
        elif members:
            sections.append(Section(boxes=members))
    return tuple(sections)
