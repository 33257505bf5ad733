"""English text out of Debian packages: `apt-get download` fetches them, nothing is installed, each package has its own decoder.

The archive that apt is configured for is the only thing here that touches the network. What comes out is a stream of documents, one a
file (a chapter, where a package keeps all of them in one file), because held-out text must be whole files.
"""

from __future__ import annotations

import bz2
import gzip
import html
import lzma
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Documents = Iterator[tuple[str, str]]  # name inside the package, text


class PackageMissing(RuntimeError):
    """apt could not fetch a package; the message says what to try."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """`names` are tried in order: releases of Debian number some documentation packages after what they document."""

    names: tuple[str, ...]
    read: Callable[[Path], Documents]
    optional: bool = False  # only with --dictionaries


def fetch(package: Package, cache: Path) -> Path:
    """The folder that `package` is unpacked into, downloading it when it is not there."""
    for name in package.names:
        if (cache / name / "done").exists():
            return cache / name
    cache.mkdir(parents=True, exist_ok=True)
    said = ""
    for name in package.names:
        run = subprocess.run(["apt-get", "download", name], cwd=cache, capture_output=True, text=True, check=False)
        archives = sorted(cache.glob(f"{name}_*.deb"))
        if run.returncode == 0 and archives:
            subprocess.run(["dpkg-deb", "-x", archives[-1], cache / name], check=True)
            archives[-1].unlink()
            (cache / name / "done").touch()
            return cache / name
        said = run.stderr.strip().splitlines()[-1:] and run.stderr.strip().splitlines()[-1]
    raise PackageMissing(
        f"apt could not download {' or '.join(package.names)}: {said}\n"
        "Run `apt-get update` first. This needs a Debian or Ubuntu archive; other text goes in with --source FOLDER."
    )


def sword(folder: Path) -> Documents:
    """SWORD zCom4 commentaries: `*s` holds 12-byte records (offset, packed size, plain size) into the zlib chunks of `*z`."""
    for index in sorted([*folder.rglob("*.czs"), *folder.rglob("*.bzs")]):
        data = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        for number, (start, size, _) in enumerate(struct.iter_unpack("<III", index.read_bytes())):
            raw = zlib.decompress(data[start : start + size]).decode("utf-8", "replace")
            yield f"{index.stem}/{number}", without_tags(re.sub(r"<note.*?</note>", "", raw, flags=re.DOTALL))


def r_character_vectors(folder: Path) -> Documents:
    """R's lazy-load database: `.rdx` names (offset, length) pairs of records in `.rdb`, each a serialized vector of lines."""
    for index in sorted(folder.rglob("Rdata.rdx")):
        pairs = re.findall(rb"\0\0\0\x0d\0\0\0\x02(.{4})(.{4})", zlib.decompress(index.read_bytes(), 31), re.DOTALL)
        data = index.with_suffix(".rdb").read_bytes()
        for number, (offset, length) in enumerate(pairs):
            start, size = int.from_bytes(offset), int.from_bytes(length)
            lines = _strings(_unpacked(data[start + 4 : start + size]))
            if lines:
                yield f"{number}", "\n\n".join(" ".join(p.split("\n")) for p in re.split(r"\n{2,}", "\n".join(lines)))


def _unpacked(record: bytes) -> bytes:
    kind, body = record[:1], record[1:]
    if kind == b"Z":
        return lzma.decompress(body, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return bz2.decompress(body) if kind == b"2" else zlib.decompress(record)


def _strings(serialized: bytes) -> list[str]:
    """The character vector in R's XDR serialization, version 2 or 3; empty for anything else."""
    at = 14 if serialized[5] == 2 else 18 + int.from_bytes(serialized[14:18])
    if serialized[at + 3] != 16:
        return []
    count, at = int.from_bytes(serialized[at + 4 : at + 8]), at + 8
    found: list[str] = []
    for _ in range(count):
        length = int.from_bytes(serialized[at + 4 : at + 8])
        found.append(serialized[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return found


def files(pattern: str, leave_out: str = "/translations/") -> Callable[[Path], Documents]:
    """Text files as they are, unpacked where gzipped; pages of HTML without their tags."""

    def read(folder: Path) -> Documents:
        for path in sorted(folder.rglob(pattern)):
            if leave_out in path.as_posix() or path.is_symlink() or not path.is_file():
                continue
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode("utf-8", "replace")
            yield path.relative_to(folder).as_posix(), without_tags(text) if ".html" in path.name else text

    return read


def dictionary(folder: Path) -> Documents:
    """Webster 1913 in dictd's format, in documents of about 64 kB that end between two entries."""
    for path in sorted(folder.rglob("*.dict.dz")):
        entries = re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
        yield from _bundles(path.name, [re.sub(r"\n? *\[1913 Webster\]", "", entry) for entry in entries])


def glosses(folder: Path) -> Documents:
    """WordNet's definitions and examples, the part of a line behind the bar."""
    for path in sorted(folder.rglob("data.*")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from _bundles(path.name, [line.partition("|")[2].strip() for line in lines if "|" in line])


def _bundles(name: str, entries: list[str], size: int = 1 << 16) -> Documents:
    bundle, number, length = list[str](), 0, 0
    for entry in entries:
        bundle.append(entry)
        length += len(entry)
        if length > size or entry is entries[-1]:
            yield f"{name}/{number}", "\n".join(bundle)
            bundle, number, length = [], number + 1, 0


def without_tags(text: str) -> str:
    """Text of HTML or OSIS: block tags end a line, others vanish."""
    text = re.sub(r"<(script|style|head)\b.*?</\1>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.sub(r"</?(p|div|br|h\d|li|ul|ol|tr|table|pre|blockquote|title|chapter|verse|l|lg)\b[^>]*>", "\n", text, flags=re.IGNORECASE)
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    return re.sub(r"[ \t]*\n\s*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


PACKAGES = (
    Package(names=("sword-comm-tdavid",), read=sword),
    Package(names=("sword-comm-mhcc",), read=sword),
    Package(names=("anarchism",), read=files("html/*.html")),
    Package(names=("r-cran-janeaustenr",), read=r_character_vectors),
    Package(names=("linux-doc-6.1", "linux-doc-6.12", "linux-doc"), read=files("Documentation/**/*.[rt][sx]t.gz")),
    Package(names=("python3.11-doc", "python3.13-doc", "python3.12-doc"), read=files("html/_sources/**/*.txt")),
    Package(names=("debian-handbook",), read=files("html/en-US/*.html")),
    Package(names=("dict-gcide",), read=dictionary, optional=True),
    Package(names=("wordnet-base",), read=glosses, optional=True),
)
