"""The weight store: each weight quantized once, shared by all compiled graphs, renewed when a parameter changes.

An entry belongs to the parameters it was computed from (held weakly) and to a recipe. It is current while each parameter has the
version counter and the memory address that it had; in-place updates, `load_state_dict` and `param.data = ...` change one of them.
Optimizers that are a `torch.optim.Optimizer` are watched, since fused ones change neither. Under FSDP they step shards, and what is
gathered from those changes neither as well: so a step also renews what is trained and belongs to no optimizer. Nor is either changed
by writes through `param.data.add_(...)`, and by in-place writes to parameters made under `torch.inference_mode()`: after those, call
`fp4compile.refresh(model)`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.passes.fold_weights import CutConstant

State = tuple[tuple[int, ...], ...]
Key = tuple[str, tuple[int, ...]]  # recipe, identities of the parameters


class WeightFreed(Fp4CompileError, RuntimeError):
    template = (
        "a compiled graph needs the high-precision weight of shape {shape}, but free_weights released it. "
        "Call fp4compile.restore(model) first, or compile without free_weights."
    )


@dataclass(kw_only=True)
class _Entry:
    parameters: tuple[weakref.ref[Tensor], ...]
    values: tuple[Tensor, ...]
    state: State
    compute: fx.GraphModule


@dataclass(kw_only=True, eq=False)
class Reader:
    """All that one compiled graph reads from the store. A call whose parameters are as they were costs a glance at each."""

    store: WeightStore
    cuts: Sequence[CutConstant]
    seen: State = ()
    values: list[Tensor] | None = None  # let go whenever an entry of the store changes or dies

    def __post_init__(self) -> None:
        self.inputs = sorted({i for cut in self.cuts for i in cut.inputs})
        self.store.readers.add(self)

    def read(self, args: Sequence[Tensor]) -> list[Tensor]:
        """The values of all cuts, in their order; `args` are the inputs of the graph as it was before the cuts."""
        parameters = [args[i] for i in self.inputs]
        state = tuple((id(p), *state) for p, state in zip(parameters, _state(parameters), strict=True))
        if self.values is None or state != self.seen:
            values: list[Tensor] = []
            for cut in self.cuts:
                fetched = self.store.fetch(cut.recipe, [args[i] for i in cut.inputs], cut.compute)
                values += [fetched[i] for i in cut.outputs]
            self.seen, self.values = state, values
        return self.values


@dataclass(kw_only=True)
class WeightStore:
    """Maps (parameters, recipe) to quantized tensors."""

    entries: dict[Key, _Entry] = field(default_factory=dict)
    readers: weakref.WeakSet[Reader] = field(default_factory=weakref.WeakSet)
    quantizations: int = 0  # how often a weight was quantized, for tests and reports
    freed: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    stepped: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)  # parameters that some optimizer has in its care

    def fetch(self, recipe: str, parameters: Sequence[Tensor], compute: fx.GraphModule) -> tuple[Tensor, ...]:
        """The value of `compute(*parameters)`, from the store when it is current."""
        key = (recipe, tuple(map(id, parameters)))
        entry = self.entries.get(key)
        same = entry is not None and all(ref() is p for ref, p in zip(entry.parameters, parameters, strict=True))
        if entry is not None and same and entry.state == _state(parameters):
            return entry.values
        return self._renew(key, parameters, compute, entry)

    def _renew(
        self, key: tuple[str, tuple[int, ...]], parameters: Sequence[Tensor], compute: fx.GraphModule, old: _Entry | None
    ) -> tuple[Tensor, ...]:
        if self.freed and any(map(self.is_freed, parameters)):
            raise WeightFreed(shape=tuple(parameters[0].shape))
        # Of a subclass of Tensor the codes are plain: torch 2.11 runs no custom operator on a subclass that is not a parameter.
        with torch.no_grad():
            values = tuple(compute(*(p.as_subclass(Tensor) for p in parameters)))
        self.quantizations += bool(parameters)  # orders of channels are made of none
        if old is not None and all(a.shape == b.shape and a.device == b.device for a, b in zip(old.values, values, strict=True)):
            # Same memory: a CUDA graph that reads these codes goes on without a new recording.
            for kept, new in zip(old.values, values, strict=True):
                kept.copy_(new)
            values = old.values
        drop = weakref.WeakMethod(self._drop)
        references = tuple(weakref.ref(p, lambda _, key=key: (f := drop()) and f(key)) for p in parameters)
        self._let_go()
        self.entries[key] = _Entry(parameters=references, values=values, state=_state(parameters), compute=compute)
        return values

    def _drop(self, key: Key) -> None:
        self._let_go()
        self.entries.pop(key, None)

    def _let_go(self) -> None:
        """Readers ask again: what they hold may be old, or be all that keeps the codes of a dead model alive."""
        for reader in self.readers:
            reader.values = None

    def free(self, parameter: Tensor) -> int:
        """Release the memory of `parameter`, whose entries stay current. Returns the bytes released.

        What remains is one NaN expanded to the old shape: whoever still reads the weight sees NaN, and writes raise.
        """
        if self.is_freed(parameter):
            return 0
        released = parameter.numel() * parameter.element_size()
        self._swap(parameter, torch.full((1,), torch.nan, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape))
        self.freed[id(parameter)] = weakref.ref(parameter)
        return released

    def is_freed(self, parameter: Tensor) -> bool:
        reference = self.freed.get(id(parameter))
        return reference is not None and reference() is parameter and not any(parameter.stride())

    def restore(self, parameter: Tensor, values: Tensor) -> None:
        """Give a freed parameter memory of its own, filled with `values`; entries made from it stay current."""
        self._swap(parameter, values.to(dtype=parameter.dtype, device=parameter.device, copy=True).reshape(parameter.shape).contiguous())
        self.freed.pop(id(parameter), None)

    def _swap(self, parameter: Tensor, data: Tensor) -> None:
        self._let_go()
        parameter.data = data
        for entry in self._entries_of(parameter):
            entry.state = _state([p for ref in entry.parameters if (p := ref()) is not None])

    def codes_of(self, parameter: Tensor) -> list[tuple[fx.GraphModule, tuple[Tensor, ...]]]:
        """(computation, values) of every entry computed from `parameter` alone."""
        return [(e.compute, e.values) for e in self._entries_of(parameter) if len(e.parameters) == 1]

    def refresh(self, parameters: Iterable[Tensor]) -> int:
        """Forget what was computed from `parameters`, so that the next call quantizes them again. Returns the entries forgotten."""
        wanted = {id(p) for p in parameters}
        return self._expire(entry for key, entry in self.entries.items() if wanted & set(key[1]))

    def forget_all(self) -> None:
        """Quantize everything again on its next use."""
        self._expire(self.entries.values())

    def renew_after_step(self, parameters: Iterable[Tensor]) -> None:
        """An optimizer has written to `parameters`, and perhaps to shards of what no optimizer knows as a whole."""
        parameters = list(parameters)
        for parameter in parameters:
            if (known := self.stepped.get(id(parameter))) is None or known() is not parameter:
                self.stepped[id(parameter)] = weakref.ref(parameter)
        wanted = {id(p) for p in parameters}
        self._expire(
            entry
            for key, entry in self.entries.items()
            if wanted & set(key[1]) or any(self._is_gathered(ref()) for ref in entry.parameters)
        )

    def _expire(self, entries: Iterable[_Entry]) -> int:
        """The next call computes these again. Returns how many they are."""
        self._let_go()
        stale = list(entries)
        for entry in stale:
            entry.state = ()
        return len(stale)

    def _is_gathered(self, parameter: Tensor | None) -> bool:
        known = self.stepped.get(id(parameter))
        return parameter is not None and parameter.requires_grad and (known is None or known() is not parameter)

    def _entries_of(self, parameter: Tensor) -> list[_Entry]:
        return [e for e in self.entries.values() if any(ref() is parameter for ref in e.parameters)]


def _state(parameters: Sequence[Tensor]) -> State:
    return tuple((0 if p.is_inference() else p._version, p.data_ptr()) for p in parameters)


STORE = WeightStore()


@torch.compiler.disable
def _after_optimizer_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fused optimizers write to parameters without raising their version counters: every step counts as a change."""
    STORE.renew_after_step(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_after_optimizer_step)  # type: ignore[arg-type]
