"""Every failure a user can meet, as a named class whose message ends in advice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class Fp4CompileError(Exception):
    """Base of all errors raised by fp4compile. `template` is filled from the keyword arguments."""

    template: ClassVar[str] = "{detail}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))


class UnknownName(Fp4CompileError, ValueError):
    template = "unknown {what} {found!r}{where}. {advice}"

    def __init__(self, *, what: str, found: str, valid: Iterable[str], where: str = "") -> None:
        names = sorted(str(v) for v in valid)
        near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        super().__init__(
            what=what,
            found=found,
            where=f" in {where}" if where else "",
            advice=f"{hint}Valid: {', '.join(names)}.",
        )


class IllegalCombination(Fp4CompileError, ValueError):
    template = "{where}: {found}. {needed} {advice}"


class UnsupportedDtype(Fp4CompileError, TypeError):
    template = "{where}: dtype {found} cannot be quantized to {fmt}; float32, bfloat16 or float16 is needed. Cast the tensor first."


class UnsupportedDevice(Fp4CompileError, RuntimeError):
    template = "{where}: device {found} has no fp4 kernels; cpu or cuda (compute capability >= 8.0) is needed. Move the tensor."
