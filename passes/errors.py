"""Failures that only the graph can show."""

from __future__ import annotations

from fp4compile.codegen.errors import Fp4CompileError


class SiteFellBack(Fp4CompileError, RuntimeError):
    template = (
        "strict: {site} ({role}) was to be quantized by {rule}, but {reason}. "
        'Give it precision = "high" in the policy, or drop options={{"strict": True}}.'
    )


class ForwardNotRead(Fp4CompileError, RuntimeError):
    template = (
        "strict: {site} ({role}) was to read what its forward multiplied with, by {rule}, but {reason}. "
        'Give it source = "original" or precision = "high" in the policy, or drop options={{"strict": True}}.'
    )


class GraphInvalid(Fp4CompileError, RuntimeError):
    template = "after {stage}: {found} at {node}. This is a bug in fp4compile: please report it with the dump of this graph."
