"""What was measured, in one JSON file that is whole at any time: a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.isolation.planned import Batch

VERSION: Final = 1
_SAMPLE: Final = 4096  # bytes of a tensor that are hashed beside its sum: enough to tell two checkpoints apart, and quick


class OtherRun(Fp4CompileError, ValueError):
    template = (
        "sensitivity: {path} holds the measurements of another {what}: {found}, this run has {needed}. "
        "Give another file, or delete this one to measure again."
    )


class UnreadableStore(Fp4CompileError, ValueError):
    template = "sensitivity: {path} is no file of measurements ({found}). Give another file, or delete this one."


class Store:
    """`data` is what the file holds: settings, baseline and, for each policy, facts, rows and estimates."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Read `path` where it exists. Raises `OtherRun` or `UnreadableStore`."""
        self.path = path
        self.data: dict[str, Any] = {"version": VERSION, "settings": dict(settings), "baseline": {}, "policies": {}}
        if path is not None and path.exists():
            self.data = read(path)
            for what, needed in settings.items():
                found = self.data["settings"].get(what)
                if found != needed:
                    raise OtherRun(path=path, what=what, found=_short(found), needed=_short(needed))

    def policy(self, name: str, fingerprint: str) -> dict[str, Any]:
        """The entry of a policy, made where there is none. Raises `OtherRun` where the file has another of that name."""
        entry = self.data["policies"].setdefault(name, {"fingerprint": fingerprint, "facts": [], "rows": [], "estimates": {}})
        if entry["fingerprint"] != fingerprint:
            raise OtherRun(path=self.path, what=f"policy called {name}", found=_short(entry["fingerprint"]), needed=_short(fingerprint))
        return entry

    def save(self) -> None:
        """Through a neighbour, so that whoever kills this leaves the old file or the new one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps(self.data, indent=1) + "\n")
            partial.replace(self.path)


def read(path: Path) -> dict[str, Any]:
    """Raises `UnreadableStore`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableStore(path=path, found=error) from error
    if not isinstance(data, dict) or data.get("version") != VERSION or "policies" not in data:
        raise UnreadableStore(path=path, found=f"version {VERSION} with policies is needed")
    return data


def settings_of(model: Any, batches: Sequence[Batch], loss: Callable[..., Any], roles: Any) -> dict[str, Any]:
    """What two runs must share for their rows to be of one table."""
    plain = {name: [globs] if isinstance(globs, str) else list(globs) for name, globs in (roles or {}).items()}
    return {
        "model": model_fingerprint(model),
        "batches": _digest(batches),
        "loss": getattr(loss, "__qualname__", type(loss).__name__),
        "roles": plain,
    }


def model_fingerprint(model: Any) -> str:
    """Class, and names, shapes, dtypes and some values of all parameters and buffers."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        return getattr(model, "__qualname__", type(model).__name__)
    return f"{type(model).__name__} {_digest(dict(model.state_dict()))}"


def _digest(value: Any) -> str:
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()[:16]


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        state.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if flat.numel():
            total = flat.double().sum().cpu() if not flat.is_complex() else flat.sum().cpu()
            sample = flat[:: max(flat.numel() // _SAMPLE, 1)][:_SAMPLE].cpu().contiguous()
            state.update(str(total.item()).encode() + sample.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in value:
            state.update(str(name).encode())
            _feed(state, value[name])
    elif isinstance(value, list | tuple):
        state.update(f"{len(value)}".encode())
        for item in value:
            _feed(state, item)
    else:
        state.update(repr(value).encode())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
