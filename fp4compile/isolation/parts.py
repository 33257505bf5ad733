"""The parts of a model that are judged: all its planned matmuls, those of one role, of one block, or one alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from fp4compile.codegen.errors import Fp4CompileError, UnknownName
from fp4compile.isolation.planned import Call
from fp4compile.passes.site import OperandKind
from fp4compile.policy.pattern import compile_pattern

KINDS: Final = ("role", "block", "site")
Roles = Mapping[str, str | Sequence[str]]  # name of a role -> globs on module paths


class NothingPlanned(Fp4CompileError, RuntimeError):
    template = (
        "sensitivity: policy {policy!r} quantizes nothing in this model ({found}). "
        "Choose a policy that does: `fp4compile explain` shows what each one does with every matmul."
    )


class RoleMatchesNothing(Fp4CompileError, ValueError):
    template = "sensitivity: role {role!r} with {patterns} matches none of the quantized matmuls, such as {example}. Correct its pattern."


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """One planned matmul. `flops` are those of one pass over all batches."""

    name: str
    module: str
    role: str
    block: str  # module path of its block, empty outside of all
    parameters: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """Matmuls that are quantized together while the others stay in high precision."""

    kind: str  # "all", or one of KINDS
    name: str
    sites: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A product that computes in high precision and notes every site it meets."""

    roles: Roles | None
    found: dict[str, SiteFacts]

    def __call__(self, call: Call) -> Tensor:
        site, old = call.site, self.found.get(call.site.name)
        flops = 2.0 * call.a.numel() * call.b.shape[-1]  # of experts, each row meets one
        weight = site.rhs is not None and site.rhs.kind is OperandKind.WEIGHT
        self.found[site.name] = SiteFacts(
            name=site.name, module=site.module, role=role_of(site.name, site.module, self.roles), block=block_of(site.module),
            parameters=call.b.numel() if weight else 0, flops=flops + (old.flops if old else 0.0),
        )  # fmt: skip
        return call.exact()


def role_of(name: str, module: str, roles: Roles | None) -> str:
    """The first of `roles` with a pattern on the module path; without roles, or where none matches, the last segment of the name."""
    for role, patterns in (roles or {}).items():
        if any(compile_pattern(pattern).fullmatch(module) for pattern in _as_tuple(patterns)):
            return role
    return name.rsplit(".", 1)[-1]


def block_of(module: str) -> str:
    """The path up to its first number: `model.layers.3` of `model.layers.3.mlp.up_proj`."""
    segments = module.split(".")
    at = next((i for i, segment in enumerate(segments) if segment.isdigit()), -1)
    return ".".join(segments[: at + 1])


def check_roles(roles: Roles | None, facts: Sequence[SiteFacts]) -> None:
    """Raises `RoleMatchesNothing`."""
    for role, patterns in (roles or {}).items():
        if not any(fact.role == role for fact in facts):
            raise RoleMatchesNothing(role=role, patterns=list(_as_tuple(patterns)), example=facts[0].module or facts[0].name)


def parts_of(facts: Iterable[SiteFacts], isolate: Sequence[str]) -> list[Part]:
    """Everything at once, then the parts of each kind in `isolate`, in forward order. Raises `UnknownName`."""
    facts = list(facts)
    parts = [Part(kind="all", name="all", sites=frozenset(fact.name for fact in facts))]
    for kind in isolate:
        if kind not in KINDS:
            raise UnknownName(what="kind of part", found=kind, valid=KINDS, where="sensitivity")
        groups: dict[str, list[str]] = {}
        for fact in facts:
            groups.setdefault(part_name(fact, kind), []).append(fact.name)
        parts += [Part(kind=kind, name=name, sites=frozenset(sites)) for name, sites in groups.items()]
    return parts


def part_name(fact: SiteFacts, kind: str) -> str:
    if kind == "block":
        return fact.block or "outside"
    return fact.role if kind == "role" else fact.name


def _as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
