"""`KernelCall`: the first launch goes through Triton's launcher, later ones to the compiled kernel, with the same arguments in order."""

from __future__ import annotations

from typing import Any

import pytest

from fp4compile.codegen.kernels.kernel_call import KernelCall


class Recorder:
    """Stands for a Triton kernel, or for what its first launch returns."""

    def __init__(self, result: Any = None) -> None:
        self.arg_names = ["x_ptr", "rows", "out_ptr", "BLOCK"]
        self.result = result
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, **named: Any) -> Any:
            self.launches.append((grid, values, named))
            return self.result

        return launch


def test_the_second_launch_is_the_compiled_kernels() -> None:
    compiled = Recorder()
    kernel = Recorder(compiled)
    call = KernelCall(kernel, (7,), {"num_warps": 4}, rows=5, BLOCK=64)
    for tensors in (("a", "b"), ("c", "d"), (None, "e")):
        call(*tensors)  # type: ignore[arg-type]
    assert kernel.launches == [((7, 1, 1), (), {"x_ptr": "a", "out_ptr": "b", "rows": 5, "BLOCK": 64, "num_warps": 4})]
    assert compiled.launches == [((7, 1, 1), ("c", 5, "d", 64), {}), ((7, 1, 1), (None, 5, "e", 64), {})]


def test_the_interpreter_compiles_nothing_so_every_launch_is_a_first() -> None:
    kernel = Recorder()
    call = KernelCall(kernel, (1, 2), {}, rows=5, BLOCK=64)
    call("a", "b")  # type: ignore[arg-type]
    call("c", "d")  # type: ignore[arg-type]
    assert [(grid, named["x_ptr"]) for grid, _, named in kernel.launches] == [((1, 2, 1), "a"), ((1, 2, 1), "c")]


def test_a_tensor_too_few_is_noticed() -> None:
    with pytest.raises(ValueError, match="zip"):
        KernelCall(Recorder(), (1,), {}, rows=5, BLOCK=64)("a")  # type: ignore[arg-type]
