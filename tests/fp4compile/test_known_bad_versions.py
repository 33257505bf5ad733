"""What doctor says of versions, and that compiling for a known-bad pair is refused before anything runs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from fp4compile import backend, cli_doctor, handoff
from fp4compile.codegen import known_bad, registry
from fp4compile.codegen.known_bad import Feature, KnownBadVersion, VersionTooOld
from fp4compile.codegen.registry import KernelFamily
from fp4compile.codegen.target import Target

HOPPER = Target(name="sm_90", device_type="cuda", capability=90)
BLACKWELL = Target(name="sm_100", device_type="cuda", capability=100)
CHAINED = KernelFamily(
    name="chained", device_type="cuda", ops=("scaled_mm",), folder="kernels", ending=".py", relies_on=frozenset({Feature.CHAINED_DOTS})
)


@pytest.fixture
def versions(monkeypatch):
    found = {"torch": "2.13.0", "triton": "3.9.0"}
    for module in (known_bad, cli_doctor):
        monkeypatch.setattr(module, "installed", lambda package: found[package])
    return found


def known_bad_rows(target: Target) -> dict[str, str]:
    return {row["note"]: row["verdict"] for row in (cli_doctor._known_bad_row(r, target) for r in known_bad.known_bad(target))}


def test_doctor_names_unknown_and_too_old_versions(versions) -> None:
    versions |= {"torch": "2.99.0", "triton": "3.5.0"}
    newer, older = cli_doctor._version_row("torch"), cli_doctor._version_row("triton")
    assert newer["verdict"] == "note" and "unknown to us" in newer["note"]
    assert older["verdict"] == "bad" and "3.6 or newer" in older["note"]
    versions["triton"] = "3.7.1"
    assert cli_doctor._version_row("triton")["verdict"] == "ok"


def test_doctor_tells_what_we_do_without_from_what_we_need(versions, monkeypatch) -> None:
    versions["triton"] = "3.8.0"
    chained = [note for note in known_bad_rows(BLACKWELL) if "two dots" in note]
    assert [known_bad_rows(BLACKWELL)[note] for note in chained] == ["note"] and "our kernels there do without" in chained[0]
    monkeypatch.setattr(registry, "FAMILIES", (CHAINED, *registry.FAMILIES))
    refused = [note for note, verdict in known_bad_rows(BLACKWELL).items() if verdict == "bad"]
    assert len(refused) == 1 and "two dots" in refused[0] and "compiling for it is refused" in refused[0]
    assert known_bad_rows(Target(name="cpu", device_type="cpu")) == {}


def test_doctor_says_what_breaks_in_every_backend(versions) -> None:
    versions["triton"] = "3.7.1"
    assert any("every compiled model has these" in note and verdict == "note" for note, verdict in known_bad_rows(HOPPER).items())


def test_before_torch_2_13_comparisons_on_the_cpu_do_without_fused_operators(versions) -> None:
    cpu = torch.device("cpu")
    assert handoff.rounding_like_eager(cpu) == {"emulate_precision_casts": True, "fallback_by_default": False}
    versions["torch"] = "2.12.1+cpu"
    assert handoff.rounding_like_eager(cpu)["fallback_by_default"]
    rows = known_bad_rows(Target(name="cpu", device_type="cpu"))
    [note] = [note for note in rows if "emulate_precision_casts changes nothing" in note]
    assert set(rows.values()) == {"note"} and "one by one" in note


def kernels_compiled_for(target: Target, monkeypatch) -> set[str | None]:
    """Names of the kernels of a model that is compiled as if for `target`, where one family exists, and then runs on the CPU."""
    monkeypatch.setattr(backend, "target_of", lambda device, *, where="": target)
    monkeypatch.setattr(registry, "FAMILIES", (CHAINED,))
    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.compile(nn.Linear(64, 64), backend="fp4", options={"policy": "nvfp4"})(torch.randn(3, 64))
        return {site.kernel for site in backend.last_report().sites}
    finally:
        torch.compiler.reset()


def test_compiling_with_a_known_bad_version_is_refused_with_the_reason(versions, monkeypatch) -> None:
    versions["triton"] = "3.8.0"
    with pytest.raises(Exception, match=r"triton 3\.8\.0 on sm_100 is known to be bad: two dots into one accumulator") as raised:
        kernels_compiled_for(BLACKWELL, monkeypatch)
    assert isinstance(raised.value.inner_exception, KnownBadVersion)


def test_compiling_with_a_version_too_old_is_refused_before_the_graph_is_looked_at(versions, monkeypatch) -> None:
    versions["triton"] = "3.5.1"
    monkeypatch.setattr(backend._Transform, "__call__", lambda *_: pytest.fail("the pipeline ran"))
    with pytest.raises(Exception, match=r"triton 3\.5\.1 is older") as raised:
        kernels_compiled_for(HOPPER, monkeypatch)
    assert isinstance(raised.value.inner_exception, VersionTooOld)


def test_a_good_version_is_not_refused(versions, monkeypatch) -> None:
    """The same graph and family, one Triton later."""
    assert kernels_compiled_for(BLACKWELL, monkeypatch) == {"chained"}


@pytest.mark.parametrize("triton", ["3.6.0", "3.7.1", "3.8.0", "3.9.0"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 110, 120, 121])
def test_which_devices_lose_which_supported_version(versions, triton, capability) -> None:
    """A family that relies on what a version breaks is refused by `torch.compile`: here is all that is."""
    versions["triton"] = triton
    device = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
    assert registry.families_on(device)
    lost = (capability, triton) in {(121, "3.6.0"), (121, "3.7.1")}
    with pytest.raises(KnownBadVersion, match=r"triton 3\.8 or newer") if lost else contextlib.nullcontext():
        known_bad.check_versions(device, registry.relied_on(registry.families_on(device)), where="test")


def test_doctor_names_the_kernels_of_a_gpu() -> None:
    row = cli_doctor._target_row(BLACKWELL)
    assert row["found"] == "sm_100" and "triton tcgen05" in row["note"] and "weight-only" not in row["note"]
    assert "weight-only" in cli_doctor._target_row(HOPPER)["note"]
