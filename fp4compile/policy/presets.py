"""The presets: policy files inside the package."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

from fp4compile.policy.layer import Layer, parse_layer


def list_presets() -> list[tuple[str, str]]:
    """Name and description of every preset, by name."""
    return [(name, preset_layer(name).description) for name in preset_names()]


@cache
def preset_names() -> tuple[str, ...]:
    found = (files("fp4compile.policy") / "presets").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in found if file.name.endswith(".toml")))


@cache
def preset_layer(name: str) -> Layer:
    """The preset `name`, which is one of `preset_names()`, without what it extends."""
    text = (files("fp4compile.policy") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return parse_layer(tomllib.loads(text), label=f"preset {name}", preset=True)
