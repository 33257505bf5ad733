"""Python text for what FX nodes hold: values that a call takes, functions it calls, and the short form of a type as in `bf16[16, 4096]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx

from fp4compile.codegen.residual_ops import WIDENED

_SHORT_DTYPES: Final = {
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.float8_e8m0fnu: "f8e8m0",
}
_REPRS_THAT_RUN: Final = (torch.dtype, torch.layout, torch.memory_format)
# Operators of these namespaces exist after `import torch`.
_TORCH_NAMESPACES: Final = frozenset({"aten", "prims", "prim", "inductor", "higher_order", "rngprims", "quantized", "_c10d_functional"})


def short_dtype(dtype: torch.dtype) -> str:
    return _SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def short_type(value: Any) -> str:
    """`bf16[16, 4096]` for a tensor, the expression of a symbolic number, `(.., ..)` for a tuple; "" where nothing is known."""
    if isinstance(value, torch.Tensor):
        return f"{short_dtype(value.dtype)}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(short_type(v) for v in value)})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
        return str(value)
    return "" if value is None else type(value).__name__


def is_literal(value: Any) -> bool:
    """Whether `literal` can spell the value. What it cannot spell has to be handed to the printed function."""
    if isinstance(value, (tuple, list)):
        return all(is_literal(v) for v in value)
    if isinstance(value, Mapping):
        return all(is_literal(v) for v in [*value.keys(), *value.values()])
    if isinstance(value, slice):
        return all(is_literal(v) for v in (value.start, value.stop, value.step))
    if value is None or value is Ellipsis or isinstance(value, (fx.Node, bool, int, float, complex, str, torch.device, *_REPRS_THAT_RUN)):
        return True
    return callable(value) and function_import(value) is not None


def literal(value: Any, spell: Callable[[Any], str]) -> str:
    """Python text that evaluates to `value`; `spell` gives the name of a node and of anything that is no literal."""
    if isinstance(value, fx.Node) or not (is_literal(value) or isinstance(value, (tuple, list, Mapping, slice))):
        return spell(value)
    if isinstance(value, tuple):
        inner = ", ".join(literal(v, spell) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(literal(v, spell) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(k, spell)}: {literal(v, spell)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(literal(v, spell) for v in (value.start, value.stop, value.step))})"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return f"float('{value}')"
    if isinstance(value, complex):
        return f"complex({_scalar(value.real)}, {_scalar(value.imag)})"
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    if value is Ellipsis:
        return "..."
    if isinstance(value, _REPRS_THAT_RUN) or value is None or isinstance(value, (bool, int, float, str)):
        # The mixed-in `repr` of an enum is no Python; its plain value is what an operator takes.
        return str.__repr__(value) if isinstance(value, str) else repr(value)
    return function_text(value)


def function_text(function: Any) -> str:
    """The qualified name by which a printed graph calls `function`."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{function}"
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{function.name()}"
    module, name = _home(function)
    return name if module == "builtins" else f"{module}.{name}"


def function_import(function: Any) -> str | None:
    """The import that `function_text` needs, "" where `import torch` is enough; None if no text can name the function."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace = str(function).split(".")[0]
        if namespace == "fp4":
            return f"import fp4compile.codegen.{'residual_ops' if function in WIDENED else 'ops'}  # registers torch.ops.fp4"
        return "" if namespace in _TORCH_NAMESPACES else f"# needs the import that registers torch.ops.{namespace}"
    if isinstance(function, torch._ops.HigherOrderOperator):
        return ""
    module, name = _home(function)
    if not module or not name.isidentifier() or getattr(sys.modules.get(module), name, None) is not function:
        return None
    return "" if module in ("builtins", "torch") else f"import {module}"


def _home(function: Any) -> tuple[str, str]:
    """Where a function is found. `torch.sym_max` and its kin say a private module, which is no place to call them from."""
    name = getattr(function, "__name__", "")
    if getattr(torch, name, None) is function:
        return "torch", name
    module = getattr(function, "__module__", None) or ""
    return ("operator" if module == "_operator" else module), name


def argument_names(target: Any) -> list[str]:
    """Names of an operator's positional arguments; empty for what has no schema."""
    schema = getattr(target, "_schema", None)
    return [a.name for a in schema.arguments] if schema is not None else []


def result_names(target: Any) -> list[str]:
    """Names of an operator's results, "" for the unnamed; empty for what has no schema."""
    schema = getattr(target, "_schema", None)
    return [r.name or "" for r in schema.returns] if schema is not None else []


def operation_name(target: Any) -> str:
    """`mm` of `aten.mm.default`, `softmax` of `aten._softmax.default`: the stem of the names of its results."""
    if isinstance(target, torch._ops.OpOverload):
        text = target._schema.name.split("::")[-1]
    elif isinstance(target, torch._ops.HigherOrderOperator):
        text = target.name()
    else:
        text = target if isinstance(target, str) else getattr(target, "__name__", "value")
    text = "".join(ch if ch.isalnum() else "_" for ch in text).strip("_")
    return text if text and not text[0].isdigit() else f"value_{text}".rstrip("_")


def hint_of(value: Any) -> int | None:
    """The size seen at compilation, without adding a guard; None for a size that only the data decides."""
    if isinstance(value, torch.SymInt):
        hint = value.node.hint if value.node.has_hint() else None
        return None if hint is None else int(hint)
    return int(value)
