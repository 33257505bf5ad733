"""What `calibrate` collects, held against forward hooks in eager mode; runs that were killed; input that is none."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp4compile
from fp4compile.calibration.record import Calibration, load_calibration
from fp4compile.calibration.run import NoBatches, NotFiniteInput, NothingRead, calibrate
from fp4compile.calibration.state import OtherBatches, OtherRun, digest_of
from fp4compile.calibration.watch import TwoLayersOneName
from fp4compile.codegen.errors import UnknownName
from tests.fp4compile.llama import Llama

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def llama(**options: Any) -> Llama:
    torch.manual_seed(0)
    return Llama(**options)


def token_batches(count: int = 3, lengths: tuple[int, ...] = (12, 17)) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 48, (2, lengths[i % len(lengths)]), generator=g) for i in range(count)]


def inputs_by_hooks(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """What each Linear reads, all rows of all batches."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


def assert_equal(one: Calibration, other: Calibration) -> None:
    assert one.digest == other.digest and [e.sites for e in one.entries] == [e.sites for e in other.entries]
    assert (one.batches, one.unreached) == (other.batches, other.unreached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_equal_those_of_forward_hooks(tmp_path: Path, dtype: torch.dtype):
    model, batches = llama(dtype=dtype), token_batches()
    calibrate(model, batches, out=tmp_path / "c.pt", moments="full", progress=False)
    found, seen = load_calibration(tmp_path / "c.pt"), inputs_by_hooks(model, batches)
    assert set(found.sites) == set(seen)
    for name, x in seen.items():
        statistics, x = found.statistics_for(name), x.double()
        # Eager attention runs other kernels than the traced one: values differ in their last bit.
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
        assert statistics.tokens == len(x) == 2 * (12 + 17 + 12) and statistics.k == x.shape[1]
        assert torch.allclose(statistics.moments.double(), x.mT @ x / len(x), **close), name
        assert torch.allclose(statistics.channel_amax.double(), x.abs().amax(0), **close)
        assert torch.allclose(statistics.channel_mean_square.double(), x.square().mean(0), **close)
        assert statistics.share_above(statistics.amax / 8) == pytest.approx((x.abs() > x.abs().amax() / 8).double().mean().item(), abs=0.02)


def test_layers_that_read_one_value_share_one_entry():
    found = calibrate(llama(), token_batches(1), progress=False)
    shared = [entry.sites for entry in found.entries if len(entry.sites) > 1]
    assert shared == [
        entry
        for i in range(2)
        for entry in (tuple(f"blocks.{i}.{n}_proj" for n in "qkv"), tuple(f"blocks.{i}.{n}_proj" for n in ("gate", "up")))
    ]
    assert found.unreached == ("embed.weight",) and all(e.moments is None for e in found.entries)
    assert set(found.weights) == {name for name, _ in llama().named_parameters()}


def test_a_policy_says_which_layers_and_what_of_them(tmp_path: Path):
    rules = [
        {"match": "down_proj", "weight": {"rounding": "gptq"}},
        {"match": "o_proj", "hadamard": 32, "activation": {"global_scale": "static"}},
        {"match": "blocks.1.**", "precision": "high"},
    ]
    policy = {"version": 1, "extends": "nvfp4", "calibration": str(tmp_path / "made.pt"), "rule": rules}
    found = calibrate(llama(), token_batches(1), policy=policy, progress=False)
    collected = {entry.sites[0]: (entry.moments is not None, set(entry.rotated_amax)) for entry in found.entries}
    assert {name: (full, sizes) for name, (full, sizes) in collected.items() if full or sizes} == {
        "blocks.0.o_proj": (False, {32}),
        "blocks.0.down_proj": (True, set()),
    }
    assert not any(name.startswith("blocks.1") for name in found.sites)
    assert load_calibration(tmp_path / "made.pt").digest == found.digest  # written where the policy will look for it


def test_a_policy_that_sorts_channels_gets_the_moments_of_all(tmp_path: Path):
    """Blocks of 16 channels say nothing of scales once `arc` makes blocks of other channels."""
    arc = {"channels": 16, "multiple": 16, "most": 0.5}
    rules = [
        {"match": "down_proj", "activation": {"arc": {**arc, "reorder": False}}},
        {"match": "gate_proj", "activation": {"arc": False}},
        {"match": "up_proj", "activation": {"arc": False}},
        {"match": "o_proj", "precision": "w4a16"},
        {"match": "out", "weight": {"scale_rule": "sweep"}},
    ]
    default = {"weight": {"scale_rule": "local_hessian"}, "activation": {"arc": arc}}
    policy = {"version": 1, "extends": "nvfp4", "calibration": str(tmp_path / "made.pt"), "default": default, "rule": rules}
    model, batches = llama(layers=1).eval(), token_batches(1)
    found = calibrate(model, batches, policy=policy, progress=False)
    assert {site for entry in found.entries if entry.moments is not None for site in entry.sites} == {f"blocks.0.{n}_proj" for n in "qkv"}

    def compiled(policy: dict[str, Any]) -> Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(model, backend="fp4", options={"policy": policy, "strict": True})(batches[0])

    got, exact = compiled(policy), model(batches[0])
    assert (got - exact).norm() < 0.5 * exact.norm()
    calibrate(model, batches, out=tmp_path / "blocks.pt", progress=False)
    with pytest.raises(Exception, match=r"MissingStatistics: blocks\.0\.q_proj: .*local_hessian beside arc with reorder = true needs all"):
        compiled({**policy, "calibration": str(tmp_path / "blocks.pt")})


class Killed(RuntimeError):
    pass


def interrupted(batches: list[Tensor], after: int) -> Iterator[Tensor]:
    yield from batches[:after]
    raise Killed


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path):
    model, batches, options = llama(layers=1), token_batches(5, (12,)), {"moments": "full", "save_every": 2, "progress": False}
    whole = calibrate(model, batches, out=tmp_path / "whole.pt", **options)
    with pytest.raises(Killed):
        calibrate(model, interrupted(batches, 3), out=tmp_path / "c.pt", **options)
    assert [p.name for p in tmp_path.glob("c.pt*")] == ["c.pt.partial"]
    torch._dynamo.reset()
    resumed = calibrate(model, batches, out=tmp_path / "c.pt", **options)
    assert_equal(resumed, whole)
    assert (tmp_path / "c.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert not (tmp_path / "c.pt.partial").exists()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 16)


def row_batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(8, 32, generator=g) for _ in range(4)]


def test_a_killed_process_resumes(tmp_path: Path):
    """SIGKILL after the second batch."""
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from fp4compile.calibration.run import calibrate\n"
        "from tests.fp4compile.calibration.test_run import linear, row_batches\n"
        "def batches():\n"
        "    yield from row_batches()[:2]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"calibrate(linear(), batches(), out={str(tmp_path / 'c.pt')!r}, save_every=1, progress=False)\n"
    )
    died = subprocess.run([sys.executable, "-P", "-c", script], check=False)
    assert died.returncode == -signal.SIGKILL and (tmp_path / "c.pt.partial").exists()
    resumed = calibrate(linear(), row_batches(), out=tmp_path / "c.pt", save_every=1, progress=False)
    assert_equal(resumed, calibrate(linear(), row_batches(), progress=False))


def test_what_cannot_be_resumed_says_why(tmp_path: Path):
    batches, options = token_batches(3, (12,)), {"out": tmp_path / "c.pt", "save_every": 1, "progress": False}
    with pytest.raises(Killed):
        calibrate(llama(layers=1), interrupted(batches, 2), **options)
    with pytest.raises(OtherRun, match="with another policy or other moments"):
        calibrate(llama(layers=1), batches, moments="full", **options)
    changed = llama(layers=1)
    changed.blocks[0].up_proj.weight.data[0, 0] += 1
    with pytest.raises(OtherRun, match=r"of a model with other weights \(blocks.0.up_proj.weight\)"):
        calibrate(changed, batches, **options)
    with pytest.raises(OtherBatches, match="batch 1 is not the one"):
        calibrate(llama(layers=1), [batches[0], batches[2]], **options)
    assert calibrate(changed, batches[1:], resume=False, **options).batches == 2


def test_input_that_is_none_leaves_the_model_as_it_was(tmp_path: Path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.norm(x)).exp())

    model, out = Normed(), tmp_path / "c.pt"
    model.second.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good, overflowing = torch.randn(6, 32), torch.full((6, 32), 1e30)
    for batches, error, said in (
        ([], NoBatches, "there are no batches"),
        ([good, good[:0]], NothingRead, "in batch 1 no matmul of policy 'every layer' read anything"),
        ([good, torch.full((6, 32), torch.nan)], NotFiniteInput, "192 elements of what first reads are NaN or Inf in batch 1"),
        ([overflowing], NotFiniteInput, r"elements of what second reads are NaN or Inf in batch 0"),
    ):
        with pytest.raises(error, match=said):
            calibrate(model, batches, out=out, progress=False)
        torch._dynamo.reset()
        assert not list(tmp_path.iterdir())
    with pytest.raises(NothingRead, match="policy 'bf16'"):
        calibrate(model, [good], policy="bf16", progress=False)
    with pytest.raises(UnknownName, match="Did you mean 'full'"):
        calibrate(model, [good], moments="ful")
    assert model.training and not model.second.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_are_tensors_tuples_or_mappings():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 24)

        def forward(self, x: Tensor, *, factor: Tensor) -> Tensor:
            return self.up(x * factor)

    torch.manual_seed(0)
    model, x, factor = Scaled(), torch.randn(4, 16), torch.tensor(2.0)
    found = calibrate(model, [{"x": x, "factor": factor}], progress=False)
    assert found.statistics_for("up").amax == 2 * x.abs().amax().item()
    linear = nn.Linear(16, 24)
    assert calibrate(linear, [x, (x,), [x]], progress=False).entries[0].tokens == 12


def test_batches_are_told_apart_by_their_values():
    x = torch.arange(6.0).view(2, 3)
    batches = [x, x.view(3, 2), x.double(), -x, (x,), (x, 1), (x, 2), {"x": x}, UserDict(x=x), UserDict(x=-x)]
    digests = [digest_of(batch) for batch in batches]
    assert len(set(digests)) == len(batches) - 1 and digests[7] == digests[8]  # any mapping counts as one
    assert digest_of(x.clone()) == digest_of(x.mT.contiguous().mT) == digests[0]


def test_a_layer_that_is_called_twice_has_a_name_for_each_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(torch.relu(self.up(x)))

    found = calibrate(Twice(), [torch.randn(4, 16)], progress=False)
    assert [entry.sites for entry in found.entries] == [("up",), ("up#2",)]


def test_experts_and_patches_are_observed_as_what_is_multiplied():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.up = nn.Conv2d(2, 32, 4, stride=4), nn.Parameter(torch.randn(3, 32, 48).bfloat16())

        def forward(self, image: Tensor, ends: Tensor) -> Tensor:
            tokens = self.patches(image).flatten(2).mT.flatten(0, 1)
            return torch._grouped_mm(tokens.bfloat16(), self.up, offs=ends)

    image, ends = torch.randn(1, 2, 16, 16), torch.tensor([5, 9, 16], dtype=torch.int32)
    found = calibrate(Experts(), [(image, ends)], progress=False)
    assert {site: (s.k, s.tokens) for site in found.sites for s in (found.statistics_for(site),)} == {"patches": (32, 16), "up": (32, 16)}
    assert {site: seen.shape for site, seen in found.operands.items()} == {"patches": (32, 32), "up": (3, 48, 32)}
    by_hand = torch.nn.functional.unfold(image, 4, stride=4)[0].square().mean(-1)
    assert torch.allclose(found.statistics_for("patches").channel_mean_square, by_hand, rtol=1e-4)


def test_layers_under_one_name_are_not_mixed_up():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.up(x)

    with pytest.raises(TwoLayersOneName, match="two layers are both called up"):
        calibrate(nn.Sequential(Broken(), Broken()), [torch.randn(4, 16)], progress=False)


def test_public_names():
    assert fp4compile.calibrate is calibrate and fp4compile.load_calibration is load_calibration and fp4compile.Calibration is Calibration
