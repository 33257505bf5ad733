"""A calibration that is under way, as a file beside its artefact: a run that was killed goes on from there and ends alike."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fp4compile.calibration.observers import Sums
from fp4compile.calibration.record import WeightPrint, read_plain, save_atomically
from fp4compile.calibration.watch import Watch
from fp4compile.codegen.errors import Fp4CompileError

KIND: Final = "fp4compile calibration under way"
VERSION: Final = 1


class OtherRun(Fp4CompileError, ValueError):
    template = "calibrate: {path} is of an unfinished calibration {found}. Delete it, or pass resume=False to start again."


class OtherBatches(Fp4CompileError, ValueError):
    template = (
        "calibrate: batch {index} is not the one that the unfinished calibration in {path} saw. "
        "Give the same batches in the same order, or pass resume=False to start again."
    )


@dataclass(kw_only=True)
class Progress:
    """How far a run is: the batches behind it, by their digests. `path` is None where nothing is to be resumed."""

    path: Path | None
    settings: str
    weights: Mapping[str, WeightPrint]
    done: list[str] = field(default_factory=list)

    def resume(self, watch: Watch) -> int:
        """Take up what an earlier run left in `path`, into `watch`; the number of batches that are behind it. Raises `OtherRun`."""
        if self.path is None or not self.path.exists():
            return 0
        plain = read_plain(self.path, KIND, VERSION)
        if plain["settings"] != self.settings:
            raise OtherRun(path=self.path.name, found="with another policy or other moments")
        known = _prints(plain["weights"])
        changed = next((name for name in {**known, **self.weights} if known.get(name) != self.weights.get(name)), None)
        if changed is not None:
            raise OtherRun(path=self.path.name, found=f"of a model with other weights ({changed})")
        watch.sums = {sites: Sums.of_plain(sums, torch.device("cpu")) for sites, sums in plain["sums"]}
        watch.operands, watch.parameters = _prints(plain["operands"]), _prints(plain["parameters"])
        watch.reached = set(plain["reached"])
        self.done = list(plain["done"])
        return len(self.done)

    def is_behind(self, index: int, batch: Any) -> bool:
        """Whether `batch` has been seen by the run that is resumed. Raises `OtherBatches`."""
        if index >= len(self.done):
            return False
        if digest_of(batch) != self.done[index]:
            assert self.path is not None
            raise OtherBatches(index=index, path=self.path.name)
        return True

    def save(self, watch: Watch) -> None:
        if self.path is None:
            return
        plain = {
            "kind": KIND,
            "version": VERSION,
            "settings": self.settings,
            "weights": _plain(self.weights),
            "done": self.done,
            "sums": [(sites, sums.plain()) for sites, sums in watch.sums.items()],
            "operands": _plain(watch.operands),
            "parameters": _plain(watch.parameters),
            "reached": sorted(watch.reached),
        }
        save_atomically(plain, self.path)

    def forget(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def beside(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    return path.with_name(f"{path.name}.partial")


def digest_of(batch: Any) -> str:
    """Of the tensors, numbers and texts of a batch."""
    leaves, structure = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)  # a tokenizer gives a mapping of its own kind
    found = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            found.update(repr(leaf).encode())
    return found.hexdigest()[:32]


def _plain(prints: Mapping[str, WeightPrint]) -> dict[str, tuple[tuple[int, ...], int]]:
    return {name: (p.shape, p.checksum) for name, p in prints.items()}


def _prints(plain: Mapping[str, tuple[tuple[int, ...], int]]) -> dict[str, WeightPrint]:
    return {name: WeightPrint(shape=shape, checksum=checksum) for name, (shape, checksum) in plain.items()}
