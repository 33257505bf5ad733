"""Who else computes a product: one row a peer. A peer that is not installed, refuses or fails becomes a row with the reason.

Foreign packages are tried first in a process of their own: some end theirs (an assertion in a compiler), and that must not end ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4compile.bench.case import MatmulCase
from fp4compile.bench.ours import activation, dense_weight, dense_weights, offsets
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.timing import Call, copies_for

_GROUPS: Final = (128, 64, 32)  # of torch's int4, the first that divides K
_PROBE_SECONDS: Final = 120  # for its imports, compilers and searches; most need 10 to 40
_SECONDS_TO_END: Final = 3
_FOLDERS: Final = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+")


class PeerCannot(Fp4CompileError):
    template = "{reason}"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`prepare(case, weights)` gives a function of x for each dense weight (n, k) bfloat16; (groups, n, k) where it `does_groups`."""

    name: str
    prepare: Callable[[MatmulCase, Sequence[Tensor]], list[Callable[[Tensor], Any]]]
    bits: float  # of a stored weight value
    package: str = ""  # tried in a process of its own
    does_groups: bool = False

    def calls(self, case: MatmulCase, x: Tensor) -> list[Call]:
        """A call for each copy of the weight. Raises what the peer raises."""
        if case.groups and not self.does_groups:
            raise PeerCannot(reason="grouped products are not compared")
        copies = copies_for(int(case.values * self.bits / 8), x.device)
        weights = [dense_weights(case, x.device, i) for i in range(copies)]
        return [partial(product, x) for product in self.prepare(case, weights)]


def failures() -> tuple[type[BaseException], ...]:
    """What a peer, or one of our kernels, may raise when it cannot: compilers, shapes, devices, versions."""
    triton = sys.modules.get("triton")  # not imported for its error alone
    known = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, AttributeError, LookupError, ImportError, OSError)
    known = (*known, subprocess.SubprocessError)  # a compiler that is called
    return (*known, Fp4CompileError, *([triton.TritonError] if triton else []))


@contextmanager
def noting_failure(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Put what goes wrong inside into `failed[name]`, as one line."""
    try:
        yield
    except failures() as failure:
        failed[name] = describe(failure)


def describe(failure: BaseException) -> str:
    """First and last line of what it says: compilers begin with where and end with what."""
    lines = [line.strip() for line in without_folders(str(failure)).splitlines() if line.strip()]
    said = " ... ".join(dict.fromkeys((*lines[:1], *lines[-1:])))
    return f"{type(failure).__name__}: {said[:300]}" if said else type(failure).__name__


def without_folders(text: str) -> str:
    """`text` with the names of files alone: results are kept and shown, and the folders of a machine are nobody's."""
    return _FOLDERS.sub("", text)


def _bf16(case: MatmulCase, weights: Sequence[Tensor]) -> list[Callable[[Tensor], Any]]:
    if not case.groups:
        return [partial(F.linear, weight=w) for w in weights]
    offs = offsets(case, weights[0].device)
    return [partial(torch._grouped_mm, mat2=w.mT, offs=offs) for w in weights]


def _compiled_bf16(case: MatmulCase, weights: Sequence[Tensor]) -> list[Callable[[Tensor], Any]]:
    """One graph for all sizes: Inductor calls cuBLAS or oneDNN from it, which choose by the sizes they get."""
    compiled = torch.compile(_linear_of, dynamic=True)
    return [partial(compiled, weight=w) for w in weights]


def _linear_of(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _int4(case: MatmulCase, weights: Sequence[Tensor]) -> list[Callable[[Tensor], Any]]:
    """torch's own, the speed of which does not depend on the codes: they are random."""
    group = next((g for g in _GROUPS if case.k % g == 0), 0)
    if not group:
        raise PeerCannot(reason=f"K={case.k} is no multiple of {_GROUPS[-1]}, the smallest of its groups")
    found: list[Callable[[Tensor], Any]] = []
    for w in weights:
        scales = torch.rand(case.k // group, case.n, 2, device=w.device, dtype=torch.bfloat16)
        if w.is_cuda:
            codes = torch.randint(0, 256, (case.n, case.k // 2), dtype=torch.uint8, device=w.device)
            packed = torch._convert_weight_to_int4pack(codes, 8)
            found.append(lambda x, packed=packed, scales=scales: torch._weight_int4pack_mm(x, packed, group, scales))
        else:
            codes = torch.randint(0, 16, (case.n, case.k), dtype=torch.int32)
            packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
            found.append(lambda x, packed=packed, scales=scales: torch._weight_int4pack_mm_for_cpu(x, packed, group, scales))
    return found


def _gemlite(case: MatmulCase, weights: Sequence[Tensor]) -> list[Callable[[Tensor], Any]]:
    device = weights[0].device
    if device.type != "cuda":
        raise PeerCannot(reason="its kernels need a GPU")
    helper = _package("gemlite.helper")
    suffix = "NVFP" if case.format == "nvfp4" else "MXFP"
    kind = getattr(helper, f"A16W4_{suffix}" if case.activation == "bf16" else f"A4W4_{suffix}_dynamic")
    return [kind(device=str(device), dtype=torch.bfloat16).from_linear(_linear(w), del_orig=False) for w in weights]


def _torchao(case: MatmulCase, weights: Sequence[Tensor]) -> list[Callable[[Tensor], Any]]:
    """As its documentation says: quantize_, then torch.compile."""
    if case.format != "nvfp4":
        raise PeerCannot(reason="only its nvfp4 configurations are compared")
    workflow = _package("torchao.prototype.mx_formats.inference_workflow")
    config = workflow.NVFP4WeightOnlyConfig() if case.activation == "bf16" else workflow.NVFP4DynamicActivationNVFP4WeightConfig()
    quantize_ = _package("torchao.quantization").quantize_
    torch.compiler.reset()  # after eight shapes Dynamo would run it uncompiled
    compiled = torch.compile(_linear_of, dynamic=False)
    found: list[Callable[[Tensor], Any]] = []
    for w in weights:
        linear = _linear(w)
        quantize_(nn.Sequential(linear), config)  # in place
        found.append(partial(compiled, weight=linear.weight.detach()))
    return found


BASELINE: Final = "bf16"
PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer(name=BASELINE, prepare=_bf16, bits=16, does_groups=True),
        Peer(name="compiled bf16", prepare=_compiled_bf16, bits=16),
        Peer(name="int4", prepare=_int4, bits=4.25),
        Peer(name="gemlite", prepare=_gemlite, bits=4.5, package="gemlite"),
        Peer(name="torchao", prepare=_torchao, bits=4.5, package="torchao"),
    )
}


def probe(peer: Peer, case: MatmulCase, device: torch.device) -> str:
    """Empty, or why `peer` does not run `case`: tried once, in another process where its package is foreign."""
    if not peer.package or (case.groups and not peer.does_groups):
        return ""
    if importlib.util.find_spec(peer.package) is None:
        return "not installed"
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        context = multiprocessing.get_context("spawn")
        result, told = context.Pipe(duplex=False)
        process = context.Process(target=_tell, args=(told, str(said), peer, case, str(device)))
        process.start()
        told.close()
        try:
            return result.recv() if result.poll(_PROBE_SECONDS) else f"no result after {_PROBE_SECONDS} seconds"
        except EOFError:
            return f"it ended the process in which it was tried{_last_words(said)}"
        finally:
            _end(process)


def _tell(told: Connection, said: str, peer: Peer, case: MatmulCase, device: str) -> None:
    """What the other process runs: a compiler's dump goes into the file `said`, and its abort ends only that process."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    told.send(_try_once(peer, case, device))


def _end(process: BaseProcess) -> None:
    """Some packages hang when they end."""
    process.join(_SECONDS_TO_END)
    process.kill()
    process.join()


def _last_words(said: Path) -> str:
    """The assertion or error among what a process wrote before it ended."""
    lines = without_folders(said.read_text(errors="replace")).splitlines() if said.exists() else []
    telling = [line for line in lines if "Assertion" in line] or [line for line in lines if "rror" in line]
    return f": {telling[0].strip()[-200:]}" if telling else ""


def _try_once(peer: Peer, case: MatmulCase, device: str) -> str:
    failed: dict[str, str] = {}
    where = torch.device(device)
    with torch.no_grad(), noting_failure(peer.name, failed):
        x = activation(case.m, case.k, where)
        out = peer.prepare(case, [dense_weight(case.n, case.k, where, 0)])[0](x)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        if tuple(out.shape) != (case.m, case.n):
            return f"its result has the shape {tuple(out.shape)}"
    return failed.get(peer.name, "")


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == module.split(".")[0]:
            raise PeerCannot(reason="not installed") from error
        raise


def _linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
