"""Data-parallel training on two processes equals one process on both halves of the batch: DDP, and FSDP2 with its sharded weights.

Over gloo on the CPU, and over NCCL where there are two GPUs.
"""

from __future__ import annotations

import copy
import faulthandler
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fp4compile.weights import STORE
from tests.fp4compile.eager_recipe import with_recipe
from tests.fp4compile.test_training import NEAREST, NEAREST_RECIPE, relative

STEPS, LEARNING_RATE = 3, 0.5
DEADLINE = 400  # seconds, of which a process needs 20 to 80
WIDTH, INNER = 448, 600  # each weight is larger than the first bucket of DDP, 1 MiB


class Layer(nn.Module):
    """Of a class of its own, as is `Mlp`: wrappers call modules from frames that Dynamo skips, and it compiles no frame of torch's own."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.linear(x))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Layer(WIDTH, INNER), Layer(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) - x


def start() -> tuple[nn.Module, Tensor]:
    """The same on every process. One large weight in the second shard alone: a scale of one shard would be another one."""
    generator = torch.Generator().manual_seed(0)
    model = Mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        model.up.linear.weight[-1, 3] = 2.0
    return model, torch.randn(STEPS, 2, 19, WIDTH, generator=generator)


def train(model: nn.Module, run, batches: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for batch in batches:
        loss = run(batch).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def expected() -> tuple[list[Tensor], list[float]]:
    model, data = start()
    reference = with_recipe(copy.deepcopy(model), NEAREST_RECIPE)
    optimizer = torch.optim.SGD(reference.parameters(), lr=LEARNING_RATE)
    losses = []
    for both in data:
        halves = [reference(half).square().mean() for half in both]  # each process quantizes its own half
        (sum(halves) / 2).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sum(halves).detach()) / 2)
    return [p.detach() for p in reference.parameters()], losses


def process(rank: int, kind: str, over: str, port: int, out: str) -> None:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)  # processes that wait for each other fail, and say where they were
    device = torch.device("cuda", rank) if over == "nccl" else torch.device("cpu")
    if over == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(over, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, data = start()
    wrapped, data = WRAP[kind](model.to(device)), data.to(device)
    run = torch.compile(wrapped, backend="fp4", options={"policy": NEAREST})
    losses = train(wrapped, run, data[:, rank])
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in wrapped.parameters()]
    found = {
        "losses": losses,
        "parameters": [p.detach().cpu().clone() for p in parameters],
        "quantized": STORE.quantizations,
        "alive": alive_weights(),
    }
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # what Python and torch's threads take down at an exit, and in which order, is not what is tested


def alive_weights() -> list[int]:
    """Bytes of the parameters that the store knows, and may not keep alive."""
    parameters = [ref() for entry in STORE.entries.values() for ref in entry.parameters]
    return [p.untyped_storage().nbytes() for p in parameters if p is not None]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def ddp_in_buckets(model: nn.Module) -> nn.Module:
    """Dynamo then splits the graph, and the backend sees each piece."""
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.up, model.down):
        fully_shard(layer)
    return fully_shard(model)


WRAP = {"ddp": ddp, "ddp_in_buckets": ddp_in_buckets, "fsdp": fsdp}


GLOO = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
NCCL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.parametrize("over", [pytest.param("gloo", marks=GLOO), pytest.param("nccl", marks=NCCL)])
@pytest.mark.parametrize("kind", WRAP)
def test_two_processes_train_as_one(kind: str, over: str, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(kind, over, port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    parameters, losses = expected()
    mean = [sum(pair) / 2 for pair in zip(*(f["losses"] for f in found), strict=True)]
    assert mean == pytest.approx(losses, rel=2e-3)
    for mine, other, want in zip(found[0]["parameters"], found[1]["parameters"], parameters, strict=True):
        assert torch.equal(mine, other) and relative(mine, want) < 2e-3
    # W of two layers in the forward and one transpose in the backward, in each step and once: no more, and none that is stale.
    assert {f["quantized"] for f in found} == {3 * STEPS}
    if kind == "fsdp":
        assert found[0]["alive"] and not any(found[0]["alive"]), "a gathered weight outlives its step"
