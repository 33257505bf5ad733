"""Winners of searches over tiles, kept for each device and set of versions in the user's cache folder.

The analytic choice of a launch is the default. `mode="max-autotune"` searches for the static shapes of a graph while it is compiled and
records what won; from then on launches of these shapes on this machine take the winner, in every mode and process.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.known_bad import installed

_VERSION: Final = 2  # of the files, and of what tiles mean: raise it when a kernel reads a field anew
_NAME: Final = "kind"
# float32 sums in another order differ by 2^-24 a term of random sign; another product differs by more than this.
_SAME: Final = 1e-3


class WrongTile(Fp4CompileError, RuntimeError):
    template = "a tile gave another product: {tile}. It is not taken."


class TileRecord(Protocol):
    """A frozen dataclass of numbers, as launches choose them."""

    __dataclass_fields__: Any


Tile = TypeVar("Tile", bound=TileRecord)


@dataclass(frozen=True, kw_only=True)
class TuningKey:
    """What a winner holds for. `family` names kernels and all that is constant in them: formats, dtype, layouts."""

    family: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.family} {rows_up_to(self.m)}x{self.n}x{self.k}"


def rows_up_to(m: int) -> int:
    """Rows that share a winner with `m`: few rows differ from each other, many only by powers of two."""
    return m if m <= 8 else 1 << (m - 1).bit_length()


def lookup(device: torch.device, key: TuningKey, kinds: tuple[type[Tile], ...]) -> Tile | None:
    """The winner for `key`, one of `kinds`; None where none was recorded by a search with tiles such as these. Cheap: launches ask."""
    return _lookup(device, key, kinds)


@functools.lru_cache(maxsize=8192)
def _lookup(device: torch.device, key: TuningKey, kinds: tuple[type[Any], ...]) -> Any:
    stored = _read(table_file(device)).get(str(key))
    return None if stored is None else _tile_of(stored["tile"], kinds)


def record(device: torch.device, key: TuningKey, tile: TileRecord, microseconds: float) -> None:
    """Keep `tile` as the winner for `key`. Several processes may record at once: the last one's file stands, none is ever half written."""
    file = table_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    row = {"tile": {_NAME: type(tile).__name__, **asdict(tile)}, "microseconds": round(microseconds, 3)}  # type: ignore[call-overload]
    content = {"version": _VERSION, "winners": {**_read(file), str(key): row}}
    handle, part = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "w") as out:
        json.dump(content, out, indent=1)
    Path(part).replace(file)
    _lookup.cache_clear()


def search(
    device: torch.device, key: TuningKey, candidates: Iterable[Tile], time: Callable[[Tile], float], failures: tuple[type[Exception], ...]
) -> Tile | None:
    """The fastest of `candidates`, recorded. A tile that raises one of `failures` does not fit here. None where none fits."""
    found: list[tuple[float, int, Tile]] = []
    for i, tile in enumerate(candidates):
        try:
            found.append((time(tile), i, tile))
        except failures:
            continue
    if not found:
        return None
    microseconds, _, best = min(found, key=lambda timed: timed[:2])
    record(device, key, best, microseconds)
    return best


def refuse_another_product(found: Tensor, expected: Tensor, tile: TileRecord) -> None:
    """Raises `WrongTile` where the float32 products differ by more than the order of their sums."""
    if not (found - expected).norm() <= _SAME * expected.norm():
        raise WrongTile(tile=tile)


def table_file(device: torch.device) -> Path:
    """Where winners of `device` are kept; its name says what they depend on. On the CPU nothing is searched, tests apart."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    words = (name, "torch", torch.__version__, "triton", installed("triton"))
    return folder() / (re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(words)) + ".json")


def folder() -> Path:
    return Path.home() / ".cache" / "fp4compile" / "tuning"


def _read(file: Path) -> Mapping[str, dict[str, Any]]:
    """Winners in `file`; none where there is no file, or another version's, which the next record replaces."""
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content["winners"] if isinstance(content, dict) and content.get("version") == _VERSION else {}


def _tile_of(stored: Mapping[str, Any], kinds: tuple[type[Any], ...]) -> Any:
    """None where no kind has this name and these fields: kernels changed since."""
    values = {name: value for name, value in stored.items() if name != _NAME}
    for kind in kinds:
        if kind.__name__ == stored.get(_NAME) and {f.name for f in fields(kind)} == set(values):
            return kind(**values)
    return None
