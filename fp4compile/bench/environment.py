"""What a measurement depends on besides the code measured: device, driver, versions; and the clocks, which only explain it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch

import fp4compile
from fp4compile.codegen.known_bad import installed
from fp4compile.codegen.target import target_of
from fp4compile.options import code_fingerprint


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Two measurements belong into one table when these are equal. `sources` is a hash of the files of passes and codegen."""

    device: str
    target: str
    driver: str
    threads: int
    torch: str
    cuda: str
    triton: str
    python: str
    fp4compile: str
    sources: str
    rounds: int  # of turns, fewer in a smoke run

    @classmethod
    def here(cls, device: torch.device, *, rounds: int) -> Environment:
        on_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
            target=target_of(device, where="bench").name,
            driver=_nvidia_smi(device, ("driver_version",))[0] if on_gpu else "",
            threads=0 if on_gpu else torch.get_num_threads(),
            torch=torch.__version__,
            cuda=torch.version.cuda or "",
            triton=installed("triton"),
            python=platform.python_version(),
            fp4compile=fp4compile.__version__,
            sources=code_fingerprint()[:12],
            rounds=rounds,
        )

    def as_json(self) -> dict[str, str | int]:
        return asdict(self)

    def __str__(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        threads = f", {self.threads} threads" if self.threads else ""
        triton = f", triton {self.triton}" if self.triton else ""
        return f"{self.device} ({self.target}){driver}{threads}, torch {self.torch}{triton}, python {self.python}"


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks and power limit as the driver tells them; empty where it does not."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
    if device.type != "cuda":
        return {}
    return {name: value for name, value in zip(names, _nvidia_smi(device, names), strict=True) if value}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _nvidia_smi(device: torch.device, fields: Iterable[str]) -> list[str]:
    fields = tuple(fields)
    nothing = [""] * len(fields)
    if not shutil.which("nvidia-smi"):
        return nothing
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    values = [value.strip() for value in asked.stdout.strip().split(",")]
    return values if asked.returncode == 0 and len(values) == len(fields) else nothing


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
