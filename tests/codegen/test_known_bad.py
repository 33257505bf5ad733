"""Rows cover the versions and devices they name and no other, and stop a compilation only where its kernels rely on what is broken."""

from __future__ import annotations

import pytest

from fp4compile.codegen import known_bad
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.known_bad import KNOWN_BAD, TESTED, Feature, KnownBad, KnownBadVersion, TritonMissing, VersionTooOld, check_versions
from fp4compile.codegen.target import Target


def target(capability: int) -> Target:
    return Target(name=f"sm_{capability}", device_type="cuda", capability=capability)


CPU = Target(name="cpu", device_type="cpu")


@pytest.fixture
def versions(monkeypatch):
    found = {"torch": "2.13.0+cu130", "triton": "3.9.0"}
    monkeypatch.setattr(known_bad, "installed", lambda package: found[package])
    return found


def row(**fields) -> KnownBad:
    given = {"package": "triton", "since": "3.7", "until": "3.8.1", "targets": ("sm_12",), "feature": Feature.CHAINED_DOTS}
    return KnownBad(**(given | fields), symptom="breaks", source="issue 1")


@pytest.mark.parametrize(
    ("version", "inside"),
    [("3.6.9", False), ("3.7", True), ("3.7.0", True), ("3.8.0+git43422b04", True), ("3.8.1", False), ("3.10.0", False), ("", False)],
)
def test_a_row_covers_from_since_up_to_until(version, inside) -> None:
    assert row().covers(target(120), version) is inside


def test_a_row_that_nothing_fixes_covers_every_later_version() -> None:
    assert row(until="").covers(target(121), "17.0") and not row(until="").covers(target(121), "3.6")


def test_a_row_covers_its_targets_only() -> None:
    assert [capability for capability in (80, 90, 100, 103, 120, 121) if row().covers(target(capability), "3.7.1")] == [120, 121]
    assert not row(targets=("sm_",)).covers(CPU, "3.7.1")


def test_what_is_relied_on_is_refused_and_nothing_else(versions) -> None:
    versions["triton"] = "3.8.0"
    with pytest.raises(KnownBadVersion) as raised:
        check_versions(target(100), {Feature.CHAINED_DOTS}, where="here")
    message = str(raised.value)
    assert isinstance(raised.value, Fp4CompileError)
    for part in ("here: triton 3.8.0 on sm_100", "two dots into one accumulator", "issues/10821", "Install triton 3.9 or newer"):
        assert part in message
    check_versions(target(100), {Feature.E4M3_SCALED_DOT}, where="here")
    check_versions(target(90), {Feature.CHAINED_DOTS}, where="here")
    versions["triton"] = "3.9.0"
    check_versions(target(100), {Feature.CHAINED_DOTS}, where="here")


def test_newer_versions_than_tested_are_not_refused(versions) -> None:
    versions |= {"torch": "4.0", "triton": "5.1"}
    check_versions(target(100), {row.feature for row in KNOWN_BAD if row.until}, where="here")
    assert known_bad.is_unknown("triton", "5.1") and known_bad.is_unknown("torch", "2.10.1") and not known_bad.is_unknown("torch", "2.13.9")


@pytest.mark.parametrize(("package", "version"), [("triton", "3.5.1"), ("torch", "2.10.2+cu128")])
def test_older_versions_than_supported_are_refused(versions, package, version) -> None:
    versions[package] = version
    with pytest.raises(VersionTooOld, match=rf"{package} {version.split('+')[0]}.* needed. Upgrade {package}"):
        check_versions(target(90), (), where="here")
    check_versions(CPU, (), where="here")


def test_a_gpu_without_triton_is_refused_with_the_command_to_run(versions) -> None:
    versions["triton"] = ""
    with pytest.raises(TritonMissing, match=r"pip install 'triton>=3\.6'"):
        check_versions(target(90), (), where="here")
    check_versions(CPU, (), where="here")


def test_an_absent_package_has_no_version_and_a_present_one_its_own() -> None:
    assert known_bad.installed("no-such-package") == ""
    assert known_bad.installed("tabulate").count(".") >= 1


def test_every_row_can_hold_for_a_version_we_run_with() -> None:
    """A row for versions that are refused anyway, or for no device, is dead."""
    devices = [CPU, *(target(capability) for capability in (80, 86, 89, 90, 100, 103, 110, 120, 121))]
    for bad in KNOWN_BAD:
        oldest, newest = (float(v) for v in TESTED[bad.package])
        assert oldest <= float(bad.since) <= newest
        assert any(bad.covers(device, bad.since) for device in devices)
        assert bad.source.startswith("https://github.com/")
