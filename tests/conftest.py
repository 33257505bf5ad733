"""What every test can count on: a fixed seed, no bare `passes`/`codegen` modules, a device, and goldens that can be accepted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.house_rules import bare_floor_modules

# No deadline: an example may meet a first compilation. Derandomized: a failure is the same one on every machine.
settings.register_profile("fp4compile", deadline=None, derandomize=True)
settings.load_profile("fp4compile")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite golden files with what the code gives now; review the diff like code")
    parser.addoption("--device", default="", help="device of the `device` fixture: cpu or cuda; default cuda where there is one")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_copy_of_each_module() -> Iterator[None]:
    """From the repository root `import passes` works by accident and loads modules a second time, under other names."""
    yield
    bare = bare_floor_modules(sys.modules)
    assert not bare, f"imported as top-level modules: {bare}; import fp4compile.passes and fp4compile.codegen instead"


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    """True under `pytest --accept`: write the golden instead of comparing with it."""
    return request.config.getoption("--accept")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test that serves any device runs."""
    return torch.device(request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
