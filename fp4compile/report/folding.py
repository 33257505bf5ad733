"""Say once what holds for every layer: `model.layers.{0..29}.mlp.up_proj x30` instead of thirty rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fp4compile.passes.record import SiteDecision
from fp4compile.passes.site import Role


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Sites that differ in layer numbers and role alone. `row` is the first of them, forward before backward."""

    name: str  # with {0..29} where layer numbers stand
    count: int  # sites a role
    roles: tuple[str, ...]
    row: SiteDecision


def fold(rows: Iterable[SiteDecision]) -> list[Folded]:
    """Group `rows`, in the order in which each group first appears."""
    groups: dict[tuple[object, ...], list[SiteDecision]] = {}
    for row in rows:
        groups.setdefault((_shape(row.name), row.m, row.n, row.k, *_decision(row)), []).append(row)
    single = [folded for members in groups.values() for folded in _fold_layers(members)]
    merged: dict[tuple[object, ...], list[Folded]] = {}
    for folded in single:
        _, precision, operands, rule, reason, kernel, fallback = _decision(folded.row)
        key = (folded.name, folded.count, precision, operands, without_role(rule), without_role(reason), kernel, fallback)
        merged.setdefault(key, []).append(folded)
    return [_with_roles(members) for members in merged.values()]


def without_role(text: str) -> str:
    """A policy has one rule a role, `[training] dgrad`; to a reader of the table it is the same one, `[training]`."""
    return text.removesuffix(" fprop").removesuffix(" dgrad").removesuffix(" wgrad")


def unfolded(rows: Iterable[SiteDecision]) -> list[Folded]:
    return [Folded(name=row.name, count=1, roles=(row.role,), row=row) for row in rows]


def _decision(row: SiteDecision) -> tuple[str, str, str, str, str, str, bool]:
    return row.role, row.precision, row.operands, row.rule, row.reason, row.kernel, row.fallback


def _shape(name: str) -> tuple[str, ...]:
    """The path with every number in it left out."""
    return tuple("" if part.isdecimal() else part for part in name.split("."))


def _fold_layers(rows: list[SiteDecision]) -> list[Folded]:
    indices = {tuple(int(p) for p in row.name.split(".") if p.isdecimal()): row for row in rows}
    if len(indices) < len(rows):
        return unfolded(rows)  # one name in several graphs
    parts = rows[0].name.split(".")
    out = []
    for pattern, members in _patterns(list(indices)):
        numbers = iter(pattern)
        name = ".".join(next(numbers) if part.isdecimal() else part for part in parts)
        out.append(Folded(name=name, count=len(members), roles=(rows[0].role,), row=indices[members[0]]))
    return out


def _patterns(indices: list[tuple[int, ...]]) -> list[tuple[tuple[str, ...], list[tuple[int, ...]]]]:
    """Cover index tuples by products of sets: ((("{0..1}", "{0..3}"), members), ...)."""
    if not indices[0]:
        return [((), indices)]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in indices:
        rests.setdefault(first, []).append(tuple(rest))
    same_rest: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rest in rests.items():
        same_rest.setdefault(tuple(sorted(rest)), []).append(first)
    out = []
    for rest, firsts in same_rest.items():
        for pattern, members in _patterns(list(rest)):
            out.append(((number_range(firsts), *pattern), [(first, *m) for first in sorted(firsts) for m in members]))
    return out


def number_range(numbers: Iterable[int]) -> str:
    """`7` for one number, else `{0..3,7}`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return texts[0] if texts == [str(runs[0][0])] else "{" + ",".join(texts) + "}"


def _with_roles(members: list[Folded]) -> Folded:
    first = members[0]
    roles = {role for member in members for role in member.roles}
    return Folded(name=first.name, count=first.count, roles=tuple(str(role) for role in Role if role in roles), row=first.row)
