"""Patterns on module paths, and positions in the model. The last segments of a path decide, because wrappers only ever add in front.

lm_head                   lm_head, model.lm_head, base_model.model.lm_head
layers.*.mlp.down_proj    model.layers.0.mlp.down_proj
vision_tower.**           vision_tower and everything inside it
re:.*\\.(gate|up)_proj     a regular expression that matches the whole path
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache

_REGEX = "re:"
_ANY_PARENTS = r"(?:[^.]+\.)*"
_ANY_SEGMENTS = r"(?:\.[^.]+)*"
_DEPTH = re.compile(r"(?P<end>first|last):((?P<count>\d+)|(?P<percent>\d+(\.\d+)?)%)|(?P<from>\d+)\.\.(?P<to>\d+)|(?P<at>-?\d+)")
DEPTH_FORMS = '"first:N", "last:N", "first:P%", "last:P%", "A..B" (both included) or a number'


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression whose `fullmatch` against a module path is the meaning of `pattern`. Raises ValueError with a sentence.

    A glob names whole segments at the end of the path: `*` stands for any characters of one segment, `?` for one, `[a-c]` for one of
    a set, and a segment `**` for any number of segments. `re:` starts a regular expression.
    """
    if pattern.startswith(_REGEX):
        try:
            return re.compile(pattern.removeprefix(_REGEX))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"a regular expression that Python can compile is needed ({error})") from None
    segments = pattern.split(".")
    if not all(segments):
        raise ValueError("a pattern without empty segments is needed, as in 'layers.*.mlp' or '**'")
    while segments and segments[0] == "**":
        del segments[0]
    if not segments:
        return re.compile(".*")
    body = _segment(segments[0]) + "".join(_ANY_SEGMENTS if s == "**" else r"\." + _segment(s) for s in segments[1:])
    return re.compile(_ANY_PARENTS + body)


def _segment(glob: str) -> str:
    if "**" in glob:
        raise ValueError("'**' stands for whole segments; use '*' inside one")
    parts = re.split(r"(\[!?[^\[\]]+\]|[*?])", glob)
    return "".join(_wildcard(part) if i % 2 else _literal(part) for i, part in enumerate(parts))


def _wildcard(part: str) -> str:
    if part in "*?":
        return {"*": "[^.]*", "?": "[^.]"}[part]
    inside = part[1:-1]
    negated, characters = inside.startswith("!"), inside.removeprefix("!")
    ranges = re.sub(r"[\\^&~|]", lambda m: "\\" + m[0], characters)
    try:
        re.compile(f"[{ranges}]")
    except re.error:
        raise ValueError(f"a set of characters such as [0-3] is needed, not {part}") from None
    return f"(?!\\.)[{'^' if negated else ''}{ranges}]"


def _literal(part: str) -> str:
    if "[" in part or "]" in part:
        raise ValueError("a bracket opens a set of characters, as in [0-3], and is closed again")
    return re.escape(part)


@lru_cache(maxsize=4096)
def depth_range(spec: str, layers: int) -> range:
    """The positions that `spec` names among `layers` layers, counted from 0. Raises ValueError with a sentence.

    A percentage is rounded to the nearest number of layers: "last:15%" is none of 3, 1 of 4, 7 of 48.
    """
    found = _DEPTH.fullmatch(spec)
    if found is None or found["count"] == "0" or (found["percent"] and not 0 < Fraction(found["percent"]) <= 100):
        raise ValueError(f"{DEPTH_FORMS} is needed")
    if found["at"]:
        at = int(found["at"])
        return range(at, at + 1) if at >= 0 else range(layers + at, layers + at + 1)
    if found["from"]:
        if int(found["from"]) > int(found["to"]):
            raise ValueError("a range that goes upward is needed, as in '3..7'")
        return range(int(found["from"]), int(found["to"]) + 1)
    count = int(found["count"]) if found["count"] else math.floor(layers * Fraction(found["percent"]) / 100 + Fraction(1, 2))
    return range(min(count, layers)) if found["end"] == "first" else range(max(0, layers - count), layers)
