"""Rules that cannot mean what they say: those that match nothing, and those that a later rule hides."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.passes.site import Site
from fp4compile.policy.pattern import compile_pattern
from fp4compile.policy.render import match_text
from fp4compile.policy.setting import BACKWARD

if TYPE_CHECKING:
    from fp4compile.policy.rule import Policy, Rule


class RuleMatchesNothing(Fp4CompileError, ValueError):
    template = (
        "{where}: {keys} matches none of the {count} matmuls of this graph. {nearest} Correct or delete the rule. Where the graph is only "
        'part of the model, or the policy serves several models, give the rule optional = true, or set unmatched = "warn" in the file.'
    )


class RuleHidden(Fp4CompileError, ValueError):
    template = (
        "{where}: later rules decide every matmul that {keys} matches ({count}): {hiding}. "
        "The last match wins: move the rule behind them, narrow them, or delete it."
    )


class RuleWarning(UserWarning):
    """A rule matches nothing or is hidden, under `unmatched = "warn"`."""


def check_coverage(policy: Policy, sites: Sequence[Site], matching: Sequence[Sequence[int]], *, training: bool) -> None:
    """`matching[s]` holds the indices of the rules that match site `s`. Raises, or warns where the policy says so."""
    if not sites:
        return
    for problem in _problems(policy, sites, matching, training):
        if policy.unmatched == "error":
            raise problem
        warnings.warn(str(problem), RuleWarning, stacklevel=3)


def _problems(
    policy: Policy, sites: Sequence[Site], matching: Sequence[Sequence[int]], training: bool
) -> Iterator[RuleMatchesNothing | RuleHidden]:
    for index, rule in enumerate(policy.rules):
        if _must_match(rule, training) and (problem := _problem(policy, index, sites, matching)) is not None:
            yield problem
    for rule in (switch.rule for switch in policy.schedule):  # now, not when the run has come to its step
        if rule is not None and _must_match(rule, training) and not any(rule.covers(site, training=training) for site in sites):
            yield _matches_nothing(rule, sites)


def _must_match(rule: Rule, training: bool) -> bool:
    if rule.optional:
        return False
    backward_only = all(role in BACKWARD for role in rule.roles)
    return rule.match.covers_graph(training=training) and (training or not backward_only)


def _problem(
    policy: Policy, index: int, sites: Sequence[Site], matching: Sequence[Sequence[int]]
) -> RuleMatchesNothing | RuleHidden | None:
    rule = policy.rules[index]
    winners = Counter(found[-1] for found in matching if index in found)
    if not winners:
        return _matches_nothing(rule, sites)
    # A rule of another file is an exception that extends this one, which is what `extends` is for.
    if any(winner == index or policy.rules[winner].setting.origin != rule.setting.origin for winner in winners):
        return None
    hiding = ", ".join(f"{policy.rules[winner].label} ({match_text(policy.rules[winner].match)})" for winner in sorted(winners))
    return RuleHidden(where=rule.label, keys=match_text(rule.match), count=winners.total(), hiding=hiding)


def _matches_nothing(rule: Rule, sites: Sequence[Site]) -> RuleMatchesNothing:
    return RuleMatchesNothing(where=rule.label, keys=match_text(rule.match), count=len(sites), nearest=_nearest(rule, sites))


def _nearest(rule: Rule, sites: Sequence[Site]) -> str:
    in_module = [site for site in sites if rule.match.covers_module(site.module)]
    if rule.match.match and in_module:
        fits = [site for site in in_module if site.role in rule.roles]
        if not fits:
            found = ", ".join(sorted({site.role for site in in_module}))
            return f"Its modules have matmuls, but in no role that it covers (found: {found}; covered: {', '.join(rule.roles)})."
        return f"{len(fits)} match the module pattern, as {fits[0].module or 'the root module'!r} does, but none all the other keys."
    paths = sorted({site.module for site in sites})
    for pattern in rule.match.match:
        inside = [] if pattern.startswith("re:") else [p for p in paths if compile_pattern(f"{pattern}.**").fullmatch(p)]
        if inside:
            return f'{pattern!r} is a module that holds some, as {inside[0]!r}: write "{pattern}.**".'
    near = [path for pattern in rule.match.match for path in _similar(pattern, paths)]
    if near:
        return f"Nearest modules: {', '.join(dict.fromkeys(near))}."
    found = {
        "module": paths[:: max(1, len(paths) - 1)] if rule.match.match else (),
        "op": {site.op for site in sites} if rule.match.op else (),
        "class": {site.class_name for site in sites} if rule.match.class_name else (),
        "trait": {trait for site in sites for trait in site.traits} if rule.match.trait else (),
        "role": {site.role for site in sites} if rule.match.role else (),
    }
    seen = "; ".join(f"{key} {', '.join(map(repr, map(str, sorted(values))))}" for key, values in found.items() if values)
    return f"The graph has {seen}." if seen else f"It has {max(site.layers for site in sites)} layers with a weight."


def _as_glob(regex: str) -> str:
    """What a regular expression on module paths usually means."""
    return re.sub(r"\\(.)", r"\1", re.sub(r"\.[*+]|\\d\+?|\[[^\]]*\][*+]?", "*", regex))


def _similar(pattern: str, paths: Sequence[str], count: int = 3) -> list[str]:
    """Paths whose last segments read most like `pattern`, which is compared with `*` for every layer number if it has one."""
    plain = _as_glob(pattern.removeprefix("re:")) if pattern.startswith("re:") else pattern.replace("**.", "")
    length = plain.count(".") + 1
    spelled: dict[str, str] = {}
    for path in paths:
        tail = ".".join(path.split(".")[-length:])
        spelled.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", tail) if "*" in plain else tail, path)
    return [spelled[key] for key in difflib.get_close_matches(plain, list(spelled), n=count, cutoff=0.5)]
