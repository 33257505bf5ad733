"""The artefact as data: what it keeps, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp4compile.calibration.histogram import BINS, count_magnitudes
from fp4compile.calibration.observers import Sums, Wanted
from fp4compile.calibration.record import (
    Calibration,
    LayerStatistics,
    MissingStatistics,
    UnreadableCalibration,
    WeightPrint,
    load_calibration,
)
from fp4compile.codegen.reference.hadamard import hadamard_ref

CPU, ALL = torch.device("cpu"), Wanted(moments=True, rotations=(16, 32))


def rows(tokens: int, k: int = 40, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, k, generator=g) * torch.logspace(-1, 1, k)


def statistics(*batches: torch.Tensor, sites: tuple[str, ...] = ("a",), wanted: Wanted = ALL) -> LayerStatistics:
    sums = Sums.empty(batches[0].shape[-1], wanted, CPU)
    for batch in batches:
        sums.add(batch)
    return sums.statistics(sites)


def test_statistics_are_those_of_all_rows_at_once():
    first, second = rows(5000), rows(37, seed=1).view(1, 37, 40)  # more rows than are taken at once; a batch dimension
    found, x = statistics(first, second, second[:, :0]), torch.cat([first, second[0]]).double()
    moments = x.mT @ x / len(x)
    assert (found.k, found.tokens, found.amax) == (40, 5037, x.abs().amax().float().item())
    assert torch.equal(found.channel_amax, x.abs().amax(0).float())
    assert torch.allclose(found.channel_mean_square.double(), x.square().mean(0), rtol=1e-5)
    assert torch.allclose(found.moments.double(), moments, rtol=1e-4, atol=1e-4)
    padded = torch.zeros(48, 48, dtype=torch.float64)
    padded[:40, :40] = moments
    for i, block in enumerate(found.block_moments):
        assert torch.allclose(block.double(), padded[16 * i : 16 * i + 16, 16 * i : 16 * i + 16], rtol=1e-4, atol=1e-4)
    for size, amax in found.rotated_amax.items():
        rotated = hadamard_ref(torch.nn.functional.pad(x.float(), (0, -40 % size)), size)
        assert amax == pytest.approx(rotated.abs().amax().item(), rel=1e-6)


def test_thresholds_are_asked_about_afterwards():
    x = rows(2000)
    found = statistics(x)
    for threshold in (0.0, 0.03, 0.5, 1.0, 7.3, x.abs().amax().item() / 8, 1e6):
        exact = (x.abs() > threshold).double().mean().item()
        assert found.share_above(threshold) == pytest.approx(exact, abs=4e-3), threshold
    per_token = (x.abs() > x.abs().amax(-1, keepdim=True) / 8).double().mean().item()
    assert found.share_above_in_token(1 / 8) == per_token  # a power of two is where a bin begins
    assert found.share_above_in_token(1.0) == pytest.approx(0, abs=1e-9 + 1 / 40)
    assert statistics(torch.zeros(3, 40)).share_above(0.0) == 0


def test_bins_are_eighths_of_an_octave():
    at = torch.tensor([0.0, 1.0, 1.124, 1.125, 1.9999, 2.0, -2.0, 3.4e38])
    found = count_magnitudes(at).nonzero().flatten().tolist()
    assert found == [0, 8 * 127, 8 * 127 + 1, 8 * 127 + 7, 8 * 128, 8 * 254 + 7] and BINS == 2048


def test_two_values_merge_into_what_one_would_show():
    first, second = rows(64), rows(300, seed=1)
    merged, whole = statistics(first).merged(statistics(second, sites=("b",))), statistics(first, second)
    assert merged.sites == ("a", "b") and merged.tokens == 364 and merged.amax == whole.amax and merged.rotated_amax == whole.rotated_amax
    for name in ("channel_amax", "channel_mean_square", "block_moments", "histogram", "token_histogram", "moments"):
        assert torch.allclose(getattr(merged, name).double(), getattr(whole, name).double(), rtol=1e-4, atol=1e-4), name


def artefact(**changed: object) -> Calibration:
    fields = {
        "entries": (statistics(rows(64), sites=("layers.0.q", "layers.0.k")), statistics(rows(32), sites=("layers.0.q",), wanted=Wanted())),
        "weights": {"layers.0.q.weight": WeightPrint(shape=(8, 40), checksum=-5)},
        "operands": {"layers.0.q": WeightPrint(shape=(8, 40), checksum=-5)},
        "unreached": ("layers.1.q.weight",),
        "batches": 3,
    }
    return Calibration(**{**fields, **changed})


def test_a_file_holds_all_of_it(tmp_path: Path):
    made = artefact()
    made.save(tmp_path / "sub" / "c.pt")
    read = load_calibration(tmp_path / "sub" / "c.pt")
    assert read.digest == made.digest and read.name == "c.pt" and read.batches == 3 and read.unreached == made.unreached
    assert read.weights == made.weights and read.operands == made.operands
    for one, other in zip(made.entries, read.entries, strict=True):
        vars(other).pop("digest")  # as the file says; computed anew it is the same
        assert one.digest == other.digest and one.sites == other.sites
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["c.pt"]


def test_digests_tell_statistics_and_weights_apart():
    others = [artefact(weights={}), artefact(entries=artefact().entries[:1]), artefact(operands={})]
    assert len({c.digest for c in (artefact(), *others)}) == 4 and artefact().digest == artefact().digest
    assert statistics(rows(64)).digest != statistics(rows(64), wanted=Wanted()).digest


def test_a_site_finds_what_it_read_in_every_graph():
    found = artefact()
    assert found.statistics_for("layers.0.k") is found.entries[0]
    assert found.statistics_for("layers.0.q").tokens == 96 and found.statistics_for("layers.0.q").moments is None
    with pytest.raises(MissingStatistics, match=r"^layers.1.q: no batch reached it when calibration was calibrated"):
        found.statistics_for("layers.1.q")
    with pytest.raises(MissingStatistics, match=r"^layers.0.v: calibration has no statistics of it, only of 2 others such as layers.0"):
        found.statistics_for("layers.0.v")


@pytest.mark.parametrize(("content", "said"), [
    (None, "it does not exist"),
    (b"", "it is cut off"),
    (b"not a zip", "it is cut off"),
    ("cut", "it is cut off"),
    ({"a": 1}, "it holds no fp4compile calibration"),
    ({"kind": "fp4compile calibration", "version": 99}, "its version is 99, and this release reads 1"),
], ids=str)  # fmt: skip
def test_files_that_are_none(tmp_path: Path, content: object, said: str):
    path = tmp_path / "c.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        artefact().save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UnreadableCalibration, match=rf"c.pt cannot be read: .*{said}"):
        load_calibration(path)
