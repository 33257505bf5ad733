"""Fetching through pip, with a pip of our own: nothing here touches a network."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from fp4compile.demo.download import DownloadFailed, WheelFile, WrongFile, fetch

FILE = WheelFile(
    requirement="thing==1.0",
    wheel="thing-1.0-py3-none-any.whl",
    size="1 kB",
    member="thing/data.bin",
    sha256=hashlib.sha256(b"good").hexdigest(),
)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Make `python -m pip ...` run the given shell lines; `$dest` is the folder that was asked for."""

    def set_up(script: str) -> None:
        path = tmp_path / "python"
        path.write_text('#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\ndest=$2\n' + script)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return set_up


def wheel_with(content: bytes, folder) -> str:
    path = folder / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(FILE.member, content)
    return str(path)


def test_the_file_is_unzipped_and_kept(pip, tmp_path):
    cache = tmp_path / "cache"
    pip(f'cp {wheel_with(b"good", tmp_path)} "$dest/{FILE.wheel}"\n')
    assert fetch(FILE, cache).read_bytes() == b"good"
    pip("exit 9\n")
    assert fetch(FILE, cache) == cache / "data.bin"  # the second time asks no pip


def test_a_wheel_put_there_by_hand_is_enough(pip, tmp_path):
    pip("exit 9\n")
    Path(wheel_with(b"good", tmp_path)).rename(tmp_path / FILE.wheel)
    assert fetch(FILE, tmp_path).read_bytes() == b"good"


def test_a_failing_pip_says_what_was_needed_and_what_to_do(pip, tmp_path):
    pip("echo 'WARNING: noise' >&2\necho 'ERROR: No matching distribution found for thing==1.0' >&2\nexit 1\n")
    with pytest.raises(DownloadFailed) as raised:
        fetch(FILE, tmp_path / "cache")
    message = str(raised.value)
    assert "No matching distribution found for thing==1.0" in message
    assert "noise" not in message
    assert f"pip download --no-deps thing==1.0` elsewhere and put {FILE.wheel} into {tmp_path / 'cache'}" in message


def test_a_pip_that_says_nothing_still_has_its_exit_status_told(pip, tmp_path):
    pip("exit 3\n")
    with pytest.raises(DownloadFailed, match="pip exited with 3"):
        fetch(FILE, tmp_path / "cache")


def test_another_file_is_refused(pip, tmp_path):
    pip(f'cp {wheel_with(b"evil", tmp_path)} "$dest/{FILE.wheel}"\n')
    with pytest.raises(WrongFile, match=f"{FILE.sha256} is needed. Delete"):
        fetch(FILE, tmp_path / "cache")
