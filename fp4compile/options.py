"""The backend's options as one frozen record, and the only place that reads the environment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from fp4compile.codegen.errors import Fp4CompileError, UnknownName

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_ENVIRONMENT = {"FP4COMPILE_POLICY": "policy", "FP4COMPILE_DUMP": "dump", "FP4COMPILE_STRICT": "strict", "FP4COMPILE_VERIFY": "verify"}


class BadOption(Fp4CompileError, TypeError):
    template = "option {name!r}: found {found!r}, needed {needed}. {advice}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `torch.compile(..., backend="fp4", options={...})` accepts.

    policy: preset name, path of a TOML file, or the parsed mapping. FP4COMPILE_POLICY.
    dump: folder that receives a dump of every compiled graph. FP4COMPILE_DUMP.
    strict: a site that cannot follow the policy is an error instead of a row in the report. FP4COMPILE_STRICT=1.
    free_weights: release the high-precision originals of folded weights; `fp4compile.restore(model)` brings them back.
    verify: check the graph's invariants after every pass. FP4COMPILE_VERIFY=1.
    mode: Inductor's mode, for when other options are given too: torch.compile refuses `mode=` beside `options=`. "max-autotune" also
        searches the tiles of our kernels for products of static shape, once for this device and these versions.
    inductor: Inductor configuration patches, as in {"max_autotune": True}.
    """

    policy: Any = field(default="auto", metadata={"kinds": (str, os.PathLike, Mapping)})
    dump: str | None = field(default=None, metadata={"kinds": (str, os.PathLike, type(None))})
    strict: bool = field(default=False, metadata={"kinds": (bool,)})
    free_weights: bool = field(default=False, metadata={"kinds": (bool,)})
    verify: bool = field(default=False, metadata={"kinds": (bool,)})
    mode: str = field(default="default", metadata={"kinds": (str,)})
    inductor: Mapping[str, Any] = field(default_factory=dict, metadata={"kinds": (Mapping,)})

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Given options over the environment over defaults. Raises `UnknownName` or `BadOption`."""
        values = {**_from_environment(), **(given or {})}
        if mode is not None:
            values["mode"] = mode
        known = {f.name: f for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise UnknownName(what="option", found=str(name), valid=known, where='options of backend "fp4"')
            kinds = known[name].metadata["kinds"]
            if not isinstance(value, kinds):
                needed = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
                raise BadOption(name=name, found=value, needed=needed, advice="See fp4compile.list_options().")
        if values.get("mode", "default") not in MODES:
            raise UnknownName(what="mode", found=values["mode"], valid=MODES)
        return cls(**values)

    def fingerprint(self, policy_fingerprint: str) -> str:
        """Changes whenever compiled code could: it keys Inductor's caches."""
        shaping = (policy_fingerprint, self.strict, code_fingerprint())
        return hashlib.sha256(repr(shaping).encode()).hexdigest()


def list_options() -> dict[str, Any]:
    """Names and default values of all options."""
    defaults = Options()
    return {f.name: getattr(defaults, f.name) for f in fields(Options)}


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {name: os.environ[variable] for variable, name in _ENVIRONMENT.items() if os.environ.get(variable)}
    for flag in ("strict", "verify"):
        if flag in found:
            found[flag] = found[flag] not in ("0", "false", "no")
    return found


@cache
def code_fingerprint() -> str:
    """Hash of this package's own sources, so that a changed pass never meets graphs of the old one in a cache."""
    import fp4compile.codegen
    import fp4compile.passes

    digest = hashlib.sha256()
    for package in (fp4compile.codegen, fp4compile.passes):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
