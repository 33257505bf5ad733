"""A training step compiled for a CUDA device that is not there: by our passes, by Inductor, and by Triton down to machine code.

A program, for it replaces what asks the device: `python absent_gpu.py POLICY CAPABILITY` writes JSON, what was compiled for which operator.
The model is traced on the CPU, its graph is then said to lie on the device, and nothing is run. Inductor's kernels and ours are compiled
for the sizes of the step; ours through the launchers that would serve the device.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final

import torch
import torch._functorch.config
import torch._inductor.config
import triton
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

import fp4compile
from fp4compile import backend, capture, handoff
from fp4compile.codegen import kernels
from fp4compile.codegen.target import Target
from fp4compile.kernels_ahead import KernelsAhead
from fp4compile.passes.operator_calls import OperatorCall

DEVICE: Final = torch.device("cuda", 0)
CUDA: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
PROCESSORS: Final = 132
TOKENS, WIDTH, HIDDEN, BLOCKS = 512, 256, 512, 3


class Block(nn.Module):
    """No attention and no embedding: traced on a CPU, they become a CPU's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Driver:
    """Triton's, of a device that takes every binary and runs none."""

    launcher_cls = staticmethod(lambda *args, **kwargs: lambda *args, **kwargs: None)

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.loaded: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": PROCESSORS},
        )

    def _load(self, name: str, *args: Any) -> tuple[int, ...]:
        self.loaded.append(name)
        return (0, 0, 64, 0, 1024)  # module, function, registers, spills, threads

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def pretend(capability: int) -> tuple[Driver, list[str]]:
    """Have torch, Inductor and Triton find the device. Returns the driver and, filled later, the names of Inductor's kernels."""
    driver, of_inductor = Driver(capability), []
    triton.runtime.driver.set_active(driver)
    properties = SimpleNamespace(
        name="absent", major=capability // 10, minor=capability % 10, multi_processor_count=PROCESSORS, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, L2_cache_size=50 << 20,
        total_memory=80 << 30, shared_memory_per_block_optin=232448, gcnArchName="",
    )  # fmt: skip
    torch.version.cuda = torch.version.cuda or "13.0"  # as a CUDA build would say
    for owner, answers in (
        (torch.cuda, {"get_device_capability": divmod(capability, 10), "_get_device_properties": properties, "current_device": 0}),
        (torch.cuda, {"get_device_properties": properties, "device_count": 1, "_lazy_init": None}),
        (CudaInterface, {"is_available": True, "is_bf16_supported": True, "get_compute_capability": capability, "current_device": 0}),
        (CudaInterface.Worker, {"get_device_properties": properties, "current_device": 0}),
        (triton_helpers, {"set_driver_to_gpu": None}),
        (torch._C, {"_cuda_getCurrentRawStream": 0}),  # which a CPU build lacks
    ):
        for name, answer in answers.items():
            setattr(owner, name, staticmethod(lambda *args, answer=answer, **kwargs: answer))
    triton_heuristics.CachingAutotuner._make_launchers = lambda self: of_inductor.append(self.fn.__name__)
    joint_graph.constant_fold_uniform_value = lambda gm: None  # it computes values, on the device
    torch.ops.prims.inductor_lookup_seed.default.prim_meta_impl = _seed
    torch._inductor.config.compile_threads = 1
    torch._functorch.config.force_non_lazy_backward_lowering = True
    return driver, of_inductor


def _seed(seeds: Tensor, index: int) -> Tensor:
    """What the lookup of a seed returns; Inductor's own indexes, for which it needs the device."""
    return torch.empty_strided((), (), dtype=torch.int64, device=seeds.device)


def place_on_device(graph: fx.Graph) -> None:
    for node in graph.nodes:
        tree_map(_placed, node.meta.get("val"))
        node.args, node.kwargs = tree_map(_placed, node.args), tree_map(_placed, node.kwargs)


def _placed(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        value.fake_device = DEVICE
    return DEVICE if isinstance(value, torch.device) else value


class Stop(BaseException):
    """All is compiled."""


def compile_for_device(step: Callable[..., Any], *inputs: Tensor) -> list[OperatorCall]:
    """Compile for the device what `step` traces on the CPU. Returns the calls of our operators, each different one."""
    calls: dict[OperatorCall, None] = {}
    run_pipeline, compile_inner = handoff.JointPass.__call__, handoff.compile_fx_inner

    def transform(self: handoff.JointPass, graph: fx.Graph) -> None:
        place_on_device(graph)
        run_pipeline(self, graph)
        place_on_device(graph)

    def inner(gm: fx.GraphModule, graph_inputs: Sequence[Any], **kwargs: Any) -> Any:
        place_on_device(gm.graph)
        compile_inner(gm, tree_map(_placed, list(graph_inputs)), **kwargs)

        def stop(args: list[Any]) -> Any:
            raise Stop

        stop._boxed_call = True  # type: ignore[attr-defined]
        return stop

    handoff.JointPass.__call__, handoff.compile_fx_inner = transform, inner
    capture.device_of = lambda inputs: DEVICE
    KernelsAhead.start = lambda self, of_graph: calls.update(dict.fromkeys(of_graph))
    with contextlib.suppress(Stop):
        step(*inputs)
    return list(calls)


def launch(call: OperatorCall, driver: Driver) -> dict[str, Any]:
    """The call through what is registered for CUDA, on tensors of the CPU: what it returned and should have, and what it launched."""
    before, found = len(driver.loaded), []

    def both(*args: Any, **kwargs: Any) -> None:
        found.append(_kinds(call.target.redispatch(CUDA, *args, **kwargs)))
        found.append(_kinds(call.target(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args), **kwargs)))

    replace(call, target=both).run(torch.device("cpu"))
    return {"operator": str(call.target), "result": found[0], "expected": found[1], "kernels": driver.loaded[before:]}


def _kinds(result: Tensor | Sequence[Tensor]) -> list[str]:
    return [f"{tuple(x.shape)} {x.dtype}" for x in ([result] if isinstance(result, Tensor) else result)]


def aim_launchers(target: Target) -> None:
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        loaded = importlib.import_module(module.name)
        for name, answer in (("known_target", target), ("processors_of", PROCESSORS)):
            if hasattr(loaded, name):
                setattr(loaded, name, lambda *args, answer=answer, **kwargs: answer)


def main(policy: str, capability: int) -> dict[str, Any]:
    driver, of_inductor = pretend(capability)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS))).bfloat16()
    step = torch.compile(model, backend=backend.fp4, options={"policy": policy})
    calls = compile_for_device(step, torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16))
    aim_launchers(Target(name=f"sm_{capability}", device_type="cuda", capability=capability))
    rows = [row for graph in fp4compile.last_report().graphs for row in graph.sites]
    return {"inductor": of_inductor, "kernels": [row.kernel for row in rows], "calls": [launch(call, driver) for call in calls]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]))) + "\n")
