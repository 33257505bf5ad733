"""Paths read as users write them, however Dynamo spells the source."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.passes.module_path import readable_path
from tests.passes.test_find_matmuls import sites


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
        ("L['self'].layers[3].up", "layers.3.up"),
        ("L['self'].__dict__['_modules']['layers'].0", "layers.0"),
        ("L['self'].__dict__['_modules']['inner'].__dict__['_parameters']['w']", "inner.w"),
        ("getattr(L['self'], '0')", "0"),
        ("getattr(getattr(G['model'], '1').up, '0')", "1.up.0"),
        ("L['self']", ""),
    ],
)
def test_sources_become_paths(source: str, path: str) -> None:
    assert readable_path(source) == path


class ReadsItself(nn.Module):
    """A class with a __getattr__ of its own, as diffusers has: Dynamo reads its members through __dict__."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.layers = nn.Linear(32, 32), nn.ModuleList([nn.Linear(32, 32)])
        self.w = nn.Parameter(torch.randn(32, 32))

    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        return self.layers[0](self.conv_in(x)) @ self.w


def test_a_module_with_its_own_getattr() -> None:
    got = sites(nn.Sequential(ReadsItself()), torch.randn(3, 32))
    assert [s.name for s in got.sites] == ["0.conv_in", "0.layers.0", "0.w"]


def test_a_module_called_with_given_parameters() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32)))
    got = sites(lambda p, x: torch.func.functional_call(model, p, (x,)), dict(model.named_parameters()), torch.randn(3, 32))
    assert [s.name for s in got.sites] == ["0", "1.0"]
