"""Where a policy gets its statistics from: the artefact that its line `calibration = "file.pt"` names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from fp4compile.calibration.record import Calibration, UnreadableCalibration, load_calibration
from fp4compile.codegen.errors import Fp4CompileError


class NotCalibrated(Fp4CompileError, FileNotFoundError):
    template = "{where}: its calibration file {label} does not exist. Make it with `fp4compile calibrate MODEL.py --policy {where}`."


class AnotherCalibration(Fp4CompileError, ValueError):
    template = (
        "{where}: calibration_digest = {wanted!r}, but {label} has {found!r}: it was calibrated anew since. "
        "Take the digest out of the policy, or bring the old file back."
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationSource:
    """`label` is the file as policies spell it, relative to the outermost one; `digest` says what it holds, "" where that is not known."""

    label: str
    digest: str = ""
    path: Path = field(compare=False)
    found: Calibration | None = field(default=None, compare=False, repr=False)

    def seen_from(self, label_folder: Path, folder: Path) -> CalibrationSource:
        """The same for a reader of the outermost policy; `folder` is that of the policy that names the file."""
        if self.path.is_absolute():
            return replace(self, label=self.path.name)  # texts hold no paths of this machine
        return replace(self, label=(label_folder / self.path).as_posix(), path=folder / self.path)

    def read(self, where: str) -> CalibrationSource:
        """With what the file holds. Raises `NotCalibrated`, `UnreadableCalibration` or `AnotherCalibration`."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise NotCalibrated(where=where, label=self.label) from None
        except OSError as error:
            raise UnreadableCalibration(path=self.label, found=error.strerror or str(error)) from None
        found = _load(self.path.resolve(), stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if self.digest and self.digest != found.digest:
            raise AnotherCalibration(where=where, wanted=self.digest, label=self.label, found=found.digest)
        return replace(self, digest=found.digest, found=found)


@lru_cache(maxsize=8)
def _load(path: Path, changed: int, size: int, inode: int) -> Calibration:
    """A model is compiled graph by graph, and each asks for its policy."""
    return load_calibration(path)
