"""Make a folder of tokens to pretrain on: real text, whole documents held out, a byte-level BPE of its own, uint16 tokens.

python examples/pretrain/prepare_text.py --data .text             # 69 MB of prose and documentation out of Debian packages
python examples/pretrain/prepare_text.py --data .text --pack      # the same, and small copies to carry to a machine without a network
python examples/pretrain/prepare_text.py --data .small --source pydoc --vocabulary 1024     # Python's own help texts: no download

Each step leaves its result in the folder and is skipped when it is there, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from debian_text import PACKAGES, fetch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

END_OF_TEXT = "<|end|>"
PARTS = ("train", "heldout")


class OtherText(RuntimeError):
    """The folder was made from something else."""


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Returns the number of tokens in each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for downloads, tokenizer and tokens")
    parser.add_argument("--source", default="debian", help="debian, pydoc, or a folder of .txt files")
    parser.add_argument("--dictionaries", action="store_true", help="debian: add Webster 1913 and WordNet's glosses (45 MB more)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="size of the BPE, at most 65535")
    parser.add_argument("--pack", action="store_true", help="also write *.u16.xz, which pretrain.py unpacks by itself")
    args = parser.parse_args(argv)
    args.data.mkdir(parents=True, exist_ok=True)
    _claim(args.data, {"source": args.source, "dictionaries": args.dictionaries, "vocabulary": args.vocabulary})
    if any(not (args.data / f"{part}.txt").exists() for part in PARTS):
        _write_parts(_documents(args.source, args.dictionaries, args.data / "packages"), args.data)
    tokenizer = _tokenizer(args.data, args.vocabulary)
    counts = {part: _tokenize(tokenizer, args.data, part) for part in PARTS}
    for part in PARTS if args.pack else ():
        _pack(args.data / f"{part}.u16")
    print(f"{args.data}: " + ", ".join(f"{count:,} {part} tokens" for part, count in counts.items()))
    return counts


def _claim(folder: Path, settings: dict[str, object]) -> None:
    """Refuse to mix two texts in one folder."""
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise OtherText(f"{folder} was prepared with {note.read_text()}; choose another --data, or delete it.")
    note.write_text(json.dumps(settings))


def _documents(source: str, dictionaries: bool, cache: Path) -> Iterator[tuple[str, list[str]]]:
    """(group, its texts). Parts are drawn from each group by itself, so that the held-out text is a mixture like the rest."""
    if source == "pydoc":
        from pydoc_data.topics import topics

        yield "pydoc", list(topics.values())
    elif source == "debian":
        chosen = [p for p in PACKAGES if dictionaries or not p.optional]
        for package in (bar := tqdm(chosen, desc="packages")):
            bar.set_postfix_str(package.names[0])
            yield package.names[0], [text for _, text in package.read(fetch(package, cache))]
    else:
        yield source, [path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path(source).rglob("*.txt"))]


def _write_parts(groups: Iterable[tuple[str, list[str]]], folder: Path, share: float = 0.015) -> None:
    """About `share` of each group held out, in whole documents; documents that occur twice are kept once. One JSON string a line."""
    partial = {part: (folder / f"{part}.txt.partial").open("w") for part in PARTS}
    seen: set[str] = set()
    for _, texts in groups:
        digests = {hashlib.sha256(t.encode()).hexdigest(): t for t in texts if t.strip()}
        fresh = {digest: text for digest, text in sorted(digests.items()) if digest not in seen}  # in the order of the hash: shuffled
        seen.update(fresh)
        total = sum(map(len, fresh.values()))
        left = max(share * total, min(0.1 * total, 50_000))  # of a small text more: a loss needs some tokens to be measured on
        for text in fresh.values():
            # A document larger than what is still wanted would take too much of a small group.
            held_out = len(text) <= left
            left -= len(text) if held_out else 0
            partial["heldout" if held_out else "train"].write(json.dumps(text) + "\n")
    for part, stream in partial.items():
        stream.close()
        (folder / f"{part}.txt.partial").replace(folder / f"{part}.txt")


def _texts(folder: Path, part: str) -> Iterator[str]:
    with (folder / f"{part}.txt").open() as lines:
        yield from map(json.loads, lines)


def _tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """Byte-level BPE, trained on the training part alone."""
    path = folder / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=True)
    tokenizer.train_from_iterator(_texts(folder, "train"), trainer)
    tokenizer.save(str(path))
    return tokenizer


def _tokenize(tokenizer: Tokenizer, folder: Path, part: str) -> int:
    """Write the tokens of a part, documents joined by the end-of-text token. Returns how many there are."""
    path, partial = folder / f"{part}.u16", folder / f"{part}.u16.partial"
    if not path.exists():
        end = tokenizer.token_to_id(END_OF_TEXT)
        with partial.open("wb") as stream:
            for texts in tqdm(_batches(_texts(folder, part), 256), desc=f"tokens of {part}", unit=" batches"):
                for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                    stream.write(np.array([*encoded.ids, end], dtype=np.uint16).tobytes())
        partial.replace(path)
    return path.stat().st_size // 2


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, size)):
        yield batch


def _pack(path: Path) -> None:
    """High bytes before low bytes: xz finds more in them apart."""
    packed = path.with_suffix(".u16.xz")
    if not packed.exists():
        raw = np.fromfile(path, dtype=np.uint8).reshape(-1, 2).T.tobytes()
        packed.write_bytes(lzma.compress(raw, preset=6))
    print(f"{packed.name}: {packed.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
