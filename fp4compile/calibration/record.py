"""The calibration artefact as data: what was seen of every activation value that a layer multiplies, and of which weights.

Statistics belong to a value, not to a layer: q, k and v, which read one value, share one entry. All of them add up over batches.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final
from zipfile import BadZipFile

import torch
from torch import Tensor

from fp4compile.calibration.histogram import share_above
from fp4compile.capture import not_tracing
from fp4compile.codegen.errors import Fp4CompileError

KIND: Final = "fp4compile calibration"
VERSION: Final = 1


class UnreadableCalibration(Fp4CompileError, OSError):
    template = "calibration file {path} cannot be read: {found}. Make it with `fp4compile calibrate`, see docs/calibration.md."


class MissingStatistics(Fp4CompileError, KeyError):
    template = "{site}: {found}. {advice}"

    def __str__(self) -> str:  # KeyError shows a repr
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """What was seen of one activation value, the rows of X (tokens, K), over all batches.

    Tensors lie on the CPU; those read from a file are mapped into memory and are not to be written to.
    """

    sites: tuple[str, ...]  # names of the matmuls that read it, as in reports: `model.layers.0.self_attn.q_proj`
    k: int
    tokens: int
    amax: float  # largest |x|
    channel_amax: Tensor  # float32 (K,): largest |x| of each channel
    channel_mean_square: Tensor  # float32 (K,): E[x^2]
    block_moments: Tensor  # float32 (ceil(K/16), 16, 16): the diagonal blocks of E[x x^T], padded with zeros
    histogram: Tensor  # int64 (BINS,): how many elements have which |x|, see histogram.py
    token_histogram: Tensor  # int64 (BINS,): the same of |x| over the largest |x| of its token
    rotated_amax: Mapping[int, float] = field(default_factory=dict)  # largest |x| after a Hadamard rotation of this size, where asked for
    moments: Tensor | None = None  # float32 (K, K): E[x x^T], where asked for

    def share_above(self, threshold: float) -> float:
        """Share of all elements with |x| > `threshold`, to within the eighth of an octave that a bin spans."""
        return share_above(self.histogram, threshold)

    def share_above_in_token(self, fraction: float) -> float:
        """Share of all elements with |x| > `fraction` of the largest |x| of their own token; exact at powers of two."""
        return share_above(self.token_histogram, fraction)

    @cached_property
    def digest(self) -> str:
        """Changes with any number here; not with the names of the sites."""
        found = hashlib.sha256(repr((self.k, self.tokens, self.amax, sorted(self.rotated_amax.items()))).encode())
        for name in _TENSORS:
            value = getattr(self, name)
            found.update(b"-" if value is None else value.contiguous().numpy().tobytes())
        return found.hexdigest()

    def merged(self, other: LayerStatistics) -> LayerStatistics:
        """What one value would show that holds the rows of both."""
        tokens = max(self.tokens + other.tokens, 1)
        mine, theirs = self.tokens / tokens, other.tokens / tokens
        both = self.moments is not None and other.moments is not None
        rotated = {size: max(a, other.rotated_amax[size]) for size, a in self.rotated_amax.items() if size in other.rotated_amax}
        return LayerStatistics(
            sites=tuple(dict.fromkeys((*self.sites, *other.sites))),
            k=self.k,
            tokens=self.tokens + other.tokens,
            amax=max(self.amax, other.amax),
            channel_amax=torch.maximum(self.channel_amax, other.channel_amax),
            channel_mean_square=mine * self.channel_mean_square + theirs * other.channel_mean_square,
            block_moments=mine * self.block_moments + theirs * other.block_moments,
            histogram=self.histogram + other.histogram,
            token_histogram=self.token_histogram + other.token_histogram,
            rotated_amax=rotated,
            moments=mine * self.moments + theirs * other.moments if both else None,  # type: ignore[operator]
        )


_TENSORS: Final = ("channel_amax", "channel_mean_square", "block_moments", "histogram", "token_histogram", "moments")
_FIELDS: Final = ("sites", "k", "tokens", "amax", "rotated_amax", *_TENSORS)


@dataclass(frozen=True, kw_only=True)
class WeightPrint:
    """A weight as it was during calibration. The checksum is of its values in bfloat16, so that a cast model is still the same one."""

    shape: tuple[int, ...]
    checksum: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """One artefact: statistics by activation value, and a fingerprint of the model. Made by `calibrate`, read by `load_calibration`."""

    entries: tuple[LayerStatistics, ...]
    weights: Mapping[str, WeightPrint]  # the model's parameters by qualified name
    operands: Mapping[str, WeightPrint]  # by site: its weight as multiplied, (..., N, K), which may be part of a parameter, or several
    unreached: tuple[str, ...] = ()  # weight matrices that no matmul read during calibration
    batches: int
    name: str = "calibration"  # of its file, for messages

    def statistics_for(self, site: str) -> LayerStatistics:
        """What the matmul `site` read, over all graphs that it was part of. Raises `MissingStatistics`."""
        found = self._by_site.get(site)
        if found is None:
            raise self._missing(site)
        return found

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._by_site)

    @cached_property
    def _by_site(self) -> dict[str, LayerStatistics]:
        found: dict[str, LayerStatistics] = {}
        for entry in self.entries:
            for site in entry.sites:
                found[site] = found[site].merged(entry) if site in found else entry
        return found

    @cached_property
    def digest(self) -> str:
        """Changes with any statistic, site or weight."""
        parts = (sorted((e.sites, e.digest) for e in self.entries), sorted(self.weights.items()), sorted(self.operands.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artefact; a file that is there is replaced in one step."""
        save_atomically({"kind": KIND, "version": VERSION, **self._plain()}, Path(path))

    def _plain(self) -> dict[str, Any]:
        entries = [{**{name: getattr(e, name) for name in _FIELDS}, "digest": e.digest} for e in self.entries]
        prints = {name: {k: (p.shape, p.checksum) for k, p in getattr(self, name).items()} for name in ("weights", "operands")}
        return {"entries": entries, **prints, "unreached": self.unreached, "batches": self.batches}

    def _missing(self, site: str) -> MissingStatistics:
        weight = next((w for w in self.unreached if w == f"{site}.weight" or w == site), None)
        if weight is not None:
            return MissingStatistics(
                site=site,
                found=f"no batch reached it when {self.name} was calibrated",
                advice="Calibrate again with batches that use it, or leave it out of what the policy calibrates.",
            )
        near = difflib.get_close_matches(site, self._by_site, n=1)
        return MissingStatistics(
            site=site,
            found=f"{self.name} has no statistics of it, only of {len(self._by_site)} others" + (f" such as {near[0]}" if near else ""),
            advice="Calibrate for the policy that is compiled, `fp4compile calibrate --policy`, and the model as a whole.",
        )


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read what `calibrate` wrote. Raises `UnreadableCalibration`."""
    path = Path(path)
    found = read_plain(path, KIND, VERSION)
    prints = {name: {k: WeightPrint(shape=s, checksum=c) for k, (s, c) in found[name].items()} for name in ("weights", "operands")}
    entries = []
    for plain in found["entries"]:
        entry = LayerStatistics(**{name: plain[name] for name in _FIELDS})
        vars(entry)["digest"] = plain["digest"]  # known: computing it would read every tensor of the file
        entries.append(entry)
    return Calibration(entries=tuple(entries), **prints, unreached=found["unreached"], batches=found["batches"], name=path.name)


def read_plain(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The dictionary of a file of ours. Raises `UnreadableCalibration`."""
    try:
        with not_tracing():  # a policy is loaded while its graph is compiled
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UnreadableCalibration(path=path.name, found="it does not exist") from None
    except (OSError, RuntimeError, UnpicklingError, BadZipFile, EOFError) as error:
        raise UnreadableCalibration(path=path.name, found=f"{type(error).__name__}, it is cut off or no such file") from None
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise UnreadableCalibration(path=path.name, found=f"it holds no {kind}")
    if found["version"] != version:
        raise UnreadableCalibration(path=path.name, found=f"its version is {found['version']}, and this release reads {version}")
    return found


def save_atomically(plain: dict[str, Any], path: Path) -> None:
    """A reader sees the old file or the new one, whatever kills this process in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:  # by its path torch would write the name of the file into the archive
            torch.save(plain, file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
