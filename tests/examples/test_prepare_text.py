"""Text preparation: whole documents held out, tokens that read back, and decoders of formats that only they read."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import zlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "pretrain"


@pytest.fixture(scope="module", autouse=True)
def as_a_script():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in ("debian_text", "prepare_text", "token_windows"):
        sys.modules.pop(name, None)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Forty documents of words, one of them twice."""
    folder = tmp_path / "source"
    folder.mkdir()
    written = [f"document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(400)) + "\n" for i in range(40)]
    for i, text in enumerate([*written, written[7]]):
        (folder / f"{i:02}.txt").write_text(text)
    return written


def prepare(tmp_path: Path, *more: str) -> dict[str, int]:
    import prepare_text

    return prepare_text.main(["--data", str(tmp_path / "data"), "--source", str(tmp_path / "source"), "--vocabulary", "300", *more])


def documents(tmp_path: Path, part: str) -> list[str]:
    from token_windows import open_tokens
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    end, found = tokenizer.token_to_id("<|end|>"), [[]]
    for token in open_tokens(tmp_path / "data", part).tolist():
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(ids) for ids in found[:-1]]


def test_tokens_read_back_as_whole_documents(tmp_path: Path, texts: list[str]) -> None:
    counts = prepare(tmp_path)
    train, heldout = documents(tmp_path, "train"), documents(tmp_path, "heldout")
    assert sorted(train + heldout) == sorted(texts)  # each once, in one part
    assert 1 <= len(heldout) <= 6
    assert counts["train"] > 9 * counts["heldout"] > 0


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path, texts: list[str]) -> None:
    import prepare_text

    prepare(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir() if p.name != "settings.json"}
    (tmp_path / "data" / "heldout.u16").unlink()
    prepare(tmp_path)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir() if p.name != "settings.json"}
    assert [name for name in before if before[name] != after[name]] == ["heldout.u16"]
    with pytest.raises(prepare_text.OtherText, match="choose another --data"):
        prepare(tmp_path, "--dictionaries")


def test_packed_tokens_unpack_to_the_same(tmp_path: Path, texts: list[str]) -> None:
    from token_windows import NoTokens, open_tokens

    prepare(tmp_path, "--pack")
    expected = open_tokens(tmp_path / "data", "train").tolist()
    (tmp_path / "data" / "train.u16").unlink()
    assert open_tokens(tmp_path / "data", "train").tolist() == expected
    with pytest.raises(NoTokens, match=r"prepare_text\.py"):
        open_tokens(tmp_path / "elsewhere", "train")


def test_sword_chunks(tmp_path: Path) -> None:
    from debian_text import sword

    chapters = ["<p>First.</p><note>never seen</note>Second", "Third &amp; last"]
    packed = [zlib.compress(c.encode()) for c in chapters]
    offsets = (0, len(packed[0]))
    records = zip(offsets, packed, chapters, strict=True)
    (tmp_path / "ot.czs").write_bytes(b"".join(struct.pack("<III", o, len(p), len(c)) for o, p, c in records))
    (tmp_path / "ot.czz").write_bytes(b"".join(packed))
    assert list(sword(tmp_path)) == [("ot/0", "First.\nSecond"), ("ot/1", "Third & last")]


def character_vector(lines: list[str]) -> bytes:
    """R Internals, "Serialization Formats": XDR, version 3, native encoding, then a STRSXP of CHARSXPs."""
    strings = b"".join(struct.pack(">ii", 0x00040009, len(s.encode())) + s.encode() for s in lines)
    return (
        b"X\n"
        + struct.pack(">iii", 3, 0x00040201, 0x00030500)
        + struct.pack(">i", 5)
        + b"UTF-8"
        + struct.pack(">ii", 16, len(lines))
        + strings
    )


def test_r_character_vectors(tmp_path: Path) -> None:
    from debian_text import r_character_vectors

    payload = character_vector(["It is a truth", "universally acknowledged.", "", "Chapter 2"])
    record = struct.pack(">I", len(payload)) + zlib.compress(payload)
    index = b"X\n" + struct.pack(">iiii", 0x0D, 2, 0, len(record))
    compressor = zlib.compressobj(wbits=31)
    (tmp_path / "Rdata.rdx").write_bytes(compressor.compress(index) + compressor.flush())
    (tmp_path / "Rdata.rdb").write_bytes(record)
    assert list(r_character_vectors(tmp_path)) == [("0", "It is a truth universally acknowledged.\n\nChapter 2")]


def test_files_dictionary_and_glosses(tmp_path: Path) -> None:
    from debian_text import dictionary, files, glosses

    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "a.html").write_text("<head><title>no</title></head><h1>Yes</h1><p>x &lt; y</p><script>no</script>")
    (tmp_path / "doc.txt.gz").write_bytes(gzip.compress(b"plain *text*"))
    assert list(files("html/*.html")(tmp_path)) == [("html/a.html", "Yes\n\nx < y")]
    assert list(files("*.txt.gz")(tmp_path)) == [("doc.txt.gz", "plain *text*")]
    (tmp_path / "g.dict.dz").write_bytes(gzip.compress(b"Word \\W\\, n.\n   A meaning.\n   [1913 Webster]\n\nNext\n   More."))
    assert [text for _, text in dictionary(tmp_path)] == ["Word \\W\\, n.\n   A meaning.\n\nNext\n   More."]
    (tmp_path / "data.noun").write_text("  1 license line\n00039211 04 n | reciprocal action  \n")
    assert [text for _, text in glosses(tmp_path)] == ["reciprocal action"]


def test_a_missing_package_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    import subprocess

    from debian_text import PACKAGES, PackageMissing, fetch

    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(PackageMissing, match=r"(?s)linux-doc-6.1 or .*Unable to locate package.*apt-get update"):
        fetch(next(p for p in PACKAGES if p.names[0].startswith("linux")), tmp_path)


def test_settings_name_the_vocabulary(tmp_path: Path, texts: list[str]) -> None:
    prepare(tmp_path)
    assert json.loads((tmp_path / "data" / "settings.json").read_text())["vocabulary"] == 300
