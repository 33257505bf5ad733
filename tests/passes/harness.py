"""Run passes inside a real torch.compile trace, and keep what they did as text, values and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fp4compile import capture, handoff
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.target import Target, target_of
from fp4compile.passes.base import Pass, PassContext
from fp4compile.passes.pipeline import run
from fp4compile.passes.printer import print_graph
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import Decision, OperandKind, Plan, Role, Site, plan_of, site_of

GOLDEN = Path(__file__).parent / "golden"
PLAIN = QuantConfig()
W4A4 = {OperandKind.WEIGHT: PLAIN, OperandKind.ACTIVATION: PLAIN}
W4A16 = {OperandKind.WEIGHT: PLAIN}


Decide = Callable[[list[Site]], list[Decision]]


def decide_forward(configs: dict[OperandKind, QuantConfig]) -> Decide:
    """`configs` for every fprop, nothing elsewhere."""
    return lambda sites: [Decision(configs=configs if s.role is Role.FPROP else {}, rule="test rule", reason="test") for s in sites]


DECIDE_W4A4 = decide_forward(W4A4)


def decide_training(sites: list[Site]) -> list[Decision]:
    """The pretraining recipe on every layer (arXiv 2509.25149)."""
    weight, sr = QuantConfig(block="16x16"), QuantConfig(rounding="stochastic")  # type: ignore[arg-type]
    rotated, rotated_sr = QuantConfig(hadamard=16), QuantConfig(hadamard=16, rounding="stochastic")  # type: ignore[arg-type]
    by_role: dict[Role, dict[OperandKind, QuantConfig]] = {
        Role.FPROP: {OperandKind.WEIGHT: weight, OperandKind.ACTIVATION: PLAIN},
        Role.DGRAD: {OperandKind.WEIGHT: weight, OperandKind.GRADIENT: sr},
        Role.WGRAD: {OperandKind.ACTIVATION: rotated, OperandKind.GRADIENT: rotated_sr},
        Role.MATMUL: {},
    }
    return [Decision(configs=by_role[s.role], rule="test rule", reason="test") for s in sites]


@dataclass(kw_only=True)
class Applied:
    """What a run of passes left behind."""

    before: str = ""
    after: str = ""
    output: Any = None
    changed: list[int] = field(default_factory=list)  # a pass
    changed_again: list[int] = field(default_factory=list)  # the same passes a second time
    sites: list[Site] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)  # of the nodes that are left
    record: GraphRecord | None = None

    @property
    def same_code(self) -> bool:
        """Whether nothing but comments differs."""
        return _code(self.before) == _code(self.after)

    def site(self, name: str, role: str = "fprop") -> Site:
        return next(s for s in self.sites if s.name == name and s.role == role)

    def count(self, target: object) -> int:
        return self.targets.count(target)


def apply(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    setup: Sequence[Pass] = (),
    passes: Sequence[Pass],
    decide: Decide = DECIDE_W4A4,
    training: bool = False,
    dynamic: bool | None = None,
    strict: bool = False,
    target: Target | None = None,
) -> Applied:
    """Trace `model`, run `setup`, then `passes` twice, and execute the rewritten graph operator by operator."""
    result = Applied()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        parameters, buffers = capture.parameter_names(gm, inputs), capture.buffer_positions(gm)
        result.record = GraphRecord(id="0/0", training=training, target="cpu", policy="test")
        machine = target or target_of(torch.device("cpu"))
        ctx = PassContext(decide=decide, target=machine, record=result.record, parameters=parameters, strict=strict)

        def transform(joint: fx.GraphModule) -> None:
            capture.mark_inputs(joint.graph, buffers)
            run(joint, ctx, setup, check=True)
            done = len(result.record.passes)
            result.before = print_graph(joint)
            run(joint, ctx, passes, check=True)
            result.changed = [p.changed for p in result.record.passes[done:]]
            result.after = print_graph(joint)
            rows = len(result.record.sites)
            run(joint, ctx, passes, check=True)
            del result.record.sites[rows:]
            result.changed_again = [p.changed for p in result.record.passes[done + len(passes) :]]
            assert print_graph(joint) == result.after, "a second run changed the graph"
            result.sites = [s for n in joint.graph.nodes if (s := site_of(n)) is not None]
            result.plans = [p for n in joint.graph.nodes if (p := plan_of(n)) is not None]
            result.targets = [n.target for n in joint.graph.nodes]

        return handoff.trace_only(gm, inputs, transform=transform, fingerprint="test")

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        result.output = torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    return result


def _code(text: str) -> list[str]:
    return [line.split("  #")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]


def check_golden(path: str, before: str, after: str, accept: bool) -> None:
    """Compare with `golden/<path>.txt`; `pytest --accept` rewrites it."""
    file = GOLDEN / f"{path}.txt"
    text = f"# before\n{before.rstrip()}\n\n# after\n{after.rstrip()}\n"
    if accept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text, f"{file.name} differs: look at the difference, then `pytest --accept` if it is meant"


class TwoLayers(nn.Module):
    """K = 40 is ragged on purpose."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up = nn.Linear(32, 40, dtype=dtype)
        self.down = nn.Linear(40, 32, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class SharedInput(nn.Module):
    """q, k and v read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, n, bias=False, dtype=torch.bfloat16) for n in (32, 16, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)
