"""Sites as the graph of a small Llama has them, made by hand."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.passes.site import Role, Site

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def site(module: str, role: Role = Role.FPROP, **fields: Any) -> Site:
    given: dict[str, Any] = {
        "name": module,
        "class_name": "Linear",
        "op": "mm",
        "m": 32,
        "n": 512,
        "k": 256,
        "dtype": torch.bfloat16,
        "depth": 0,
        "layers": 1,
    }
    return Site(module=module, role=role, **{**given, **fields})


def llama(layers: int = 2, *, training: bool = False, prefix: str = "model.") -> list[Site]:
    """`layers` blocks of seven linears and two attention matmuls, then `lm_head`."""
    paths = [f"{prefix}layers.{i}.{linear}" for i in range(layers) for linear in LINEARS]
    paths.append(f"{prefix.removesuffix('model.')}lm_head")
    roles = (Role.FPROP, Role.DGRAD, Role.WGRAD) if training else (Role.FPROP,)
    found = [site(path, role, depth=depth, layers=len(paths)) for depth, path in enumerate(paths) for role in roles]
    attention = frozenset({"attention"})
    for i in range(layers):
        found += [site(f"{prefix}layers.{i}.self_attn", Role.MATMUL, op="bmm", traits=attention, depth=0, layers=len(paths))] * 2
    return found
