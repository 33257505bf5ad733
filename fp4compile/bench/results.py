"""Results in a folder, kept case by case, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from fp4compile.bench.environment import Environment
from fp4compile.bench.floor import Speeds
from fp4compile.codegen.errors import Fp4CompileError

FILE: Final = "bench.json"
_VERSION: Final = 1


class OtherEnvironment(Fp4CompileError, ValueError):
    template = (
        "bench: {file} was measured elsewhere: {differences}. Results of two machines or versions do not belong into one table; "
        "give --out another folder."
    )


class UnreadableResults(Fp4CompileError, ValueError):
    template = "bench: {file} holds no results of this version of bench ({found}). Give --out another folder, or delete it."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case. `times` are median microseconds by contender; `failed` says why others have none; `wrong` why nothing was timed."""

    kind: str
    key: str
    case: dict[str, Any]
    wrong: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    floor: float = 0.0  # microseconds
    floor_by: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return not self.wrong and OURS not in self.failed


OURS: Final = "ours"


@dataclass(kw_only=True)
class Results:
    """What a folder holds. `folder` None: kept in memory only."""

    environment: Environment
    folder: Path | None
    started: str
    clocks: dict[str, str]
    speeds: Speeds | None = None
    probes: dict[str, str] = field(default_factory=dict)  # peer and what it was tried with: empty, or why it cannot
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | None, environment: Environment, *, started: str, clocks: Mapping[str, str]) -> Results:
        """Those in `folder`, or none yet. Raises `OtherEnvironment` or `UnreadableResults`."""
        fresh = cls(environment=environment, folder=folder, started=started, clocks=dict(clocks))
        if folder is None or not (folder / FILE).exists():
            return fresh
        found = _read(folder / FILE)
        differences = [
            f"{name} {found['environment'].get(name)!r} there, {value!r} here"
            for name, value in environment.as_json().items()
            if found["environment"].get(name) != value
        ]
        if differences:
            raise OtherEnvironment(file=folder / FILE, differences="; ".join(differences))
        fresh.started, fresh.clocks, fresh.probes = found["started"], found["clocks"], found["probes"]
        fresh.speeds = Speeds(**found["speeds"]) if found["speeds"] else None
        fresh.rows = {row["key"]: Row(**row) for row in found["rows"]}
        return fresh

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        self.save()

    def save(self) -> None:
        """In one step: whoever stops the run between two leaves the file as it was."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{FILE}.part"
        part.write_text(self.to_json() + "\n")
        part.replace(self.folder / FILE)

    def to_json(self) -> str:
        content = {
            "version": _VERSION,
            "started": self.started,
            "environment": self.environment.as_json(),
            "clocks": self.clocks,
            "speeds": self.speeds.as_json() if self.speeds else None,
            "probes": self.probes,
            "rows": [asdict(row) for row in self.rows.values()],
        }
        return json.dumps(content, indent=1)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UnreadableResults(file=file, found="no JSON") from error
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise UnreadableResults(file=file, found="another layout")
    return found
