"""What a launcher would launch, recorded instead of run, and compiled for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import nvidia as gluon_nvidia
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ELEMENTS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg", "launch_pdl"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compile(self, capability: int) -> Any:
        """What Triton's own dispatcher would compile for these arguments: ones are constants, multiples of 16 are marked."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = _type_of(value)
            whole = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
            if whole and not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = kind(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def _type_of(value: Any) -> str:
    if isinstance(value, gluon_nvidia.hopper.TensorDescriptor):
        return f"tensordesc<{ELEMENTS[value.base.dtype]}[{','.join(map(str, value.block_shape))}],{value.layout!r}>"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{ELEMENTS[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{ELEMENTS[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def launches_of(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The kernels that `call` would launch, last first; nothing runs."""
    recorded: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | {n: v for n, v in named.items() if n not in OPTIONS}
        recorded.insert(0, Launch(kernel=kernel, arguments=values, options={n: v for n, v in named.items() if n in OPTIONS}))

    monkeypatch.setattr(JITFunction, "run", record)
    call()
    return recorded


def under_3_6(stack: int) -> int:
    """`stack` bytes where the ptxas is Triton 3.6's, which spills a little where later ones spill nothing; else none."""
    return stack if triton.__version__.startswith("3.6") else 0


def usage(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes of the cubin."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout + text.stderr)}
