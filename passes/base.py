"""What a pass is: a small frozen value whose fields are its options, and what it is handed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fp4compile.codegen.target import Target
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import Decision, Site


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What passes may ask. The middle asks, the front answers: no pass knows a policy file."""

    decide: Callable[[list[Site]], list[Decision]]
    target: Target
    record: GraphRecord
    parameters: Mapping[int, str]  # flat input position -> fully qualified name, parameters only
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """`changed` counts rewrites (0: the graph is as it was); `notes` are sentences for the dump."""

    changed: int
    notes: tuple[str, ...] = ()


class Pass(ABC):
    """A rewrite of one graph, in place. It neither prints, times, dumps nor verifies: the pipeline does."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult: ...


@dataclass(frozen=True, kw_only=True)
class NoMatch:
    """A refusal is a result: `reason` goes into the report and is asserted by tests."""

    reason: str
