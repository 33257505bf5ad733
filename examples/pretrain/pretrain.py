"""Pretrain a small Llama-like model in bf16 and in NVFP4: one loop, in which only the arguments of torch.compile differ.

python examples/pretrain/prepare_text.py --data .text
python examples/pretrain/pretrain.py --data .text --out runs --size 30m --recipe bf16 nvfp4_train --tokens 100M --limit-minutes 9

A run that was killed, or that reached its time limit, goes on from its last checkpoint when the same command is given again.
At the end, or at any time with plot.py: OUT/curves.svg and OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkpoint
import torch
from model import SIZES, Llama
from plot import write_comparison
from recipes import RECIPES, Recipe
from token_windows import Batch, Windows, open_tokens
from torch import Tensor, nn
from tqdm import tqdm

import fp4compile


class OtherRun(RuntimeError):
    """The output folder holds a run with other settings."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the numbers of a run. All recipes of a comparison share it."""

    size: str
    tokens: int
    batch: int  # sequences in an optimizer step
    micro_batch: int  # sequences in a forward and backward
    sequence: int
    rate: float  # peak learning rate
    warmup: float  # share of the steps
    decay: str  # cosine or wsd
    seed: int
    vocabulary: int

    @property
    def steps(self) -> int:
        return max(self.tokens // self.tokens_at(1), 1)

    def tokens_at(self, step: int) -> int:
        return step * self.batch * self.sequence

    @property
    def accumulation(self) -> int:
        return self.batch // self.micro_batch

    def rate_at(self, step: int) -> float:
        """Linear warm-up; then a cosine to a tenth, or constant with a linear decay over the last fifth."""
        begin, done = self.warmup * self.steps, (step + 1) / self.steps
        if step < begin:
            return self.rate * (step + 1) / (begin + 1)
        if self.decay == "wsd":
            return self.rate * min(1.0, max((1 - done) / 0.2, 0.01))
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0))))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When to stop, save and look; none of it changes a number."""

    deadline: float  # of time.monotonic()
    log_every: int
    save_every: int
    evaluate_every: int
    heldout: int  # held-out tokens of an evaluation
    diagnose_every: int
    keep: tuple[int, ...]  # steps whose checkpoints stay


class Log:
    """OUT/RECIPE/log.jsonl, one object a line. Resuming drops the lines that the resumed run will write again.

    Steps are written some at a time: reading a loss waits for the GPU, which then waits for the host to begin the next step.
    """

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        self.path = path
        self.steps: list[dict[str, Any]] = []  # done, not yet written; losses and norms are tensors
        self.since = time.perf_counter()

    def write(self, **row: Any) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def write_steps(self, tokens: int) -> str:
        """All steps that are waiting, of `tokens` each. Returns the last one's loss and the speed, in words."""
        numbers = torch.stack([torch.stack([row["loss"], row["norm"]]) for row in self.steps]).tolist()
        now = time.perf_counter()
        speed, self.since = tokens * len(self.steps) / (now - self.since), now
        for row, (loss, norm) in zip(self.steps, numbers, strict=True):
            self.write(**row | {"loss": loss, "norm": norm, "speed": speed})
        self.steps.clear()
        return f"loss {numbers[-1][0]:.3f}, {speed:,.0f} tokens/s"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The files of one run."""

    data: Path
    out: Path
    saved: Path  # its last checkpoint
    begin_from: Path | None  # one of another run, where it has none yet

    @property
    def start(self) -> Path:
        return self.saved if self.saved.exists() or self.begin_from is None else self.begin_from

    def kept(self, step: int) -> Path:
        return self.saved.with_stem(f"checkpoint_{step:06}")


def train(settings: Settings, recipe: Recipe, schedule: Schedule, place: Place, device: str) -> bool:
    """One recipe from its last checkpoint on. Returns whether it reached its last step."""
    data, out = place.data, place.out
    torch.manual_seed(settings.seed)
    model = Llama(SIZES[settings.size], settings.vocabulary, settings.sequence).to(device)
    optimizer = _adamw(model, settings, device)
    first = done = checkpoint.load(place.start, model, optimizer)
    fp4compile.set_step(first)  # a schedule in the policy goes by it
    run = torch.compile(model, dynamic=False, **recipe.compile_arguments(settings.steps))  # the one line
    policy = recipe.full_policy(settings.steps)
    look = fp4compile.Diagnoser(model, policy=policy) if policy and schedule.diagnose_every else None
    windows = Windows(tokens=open_tokens(data, "train"), length=settings.sequence, seed=settings.seed)
    heldout = Windows(tokens=open_tokens(data, "heldout"), length=settings.sequence, seed=0)
    log = Log(out / "log.jsonl", first)
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc=out.name)
    for step in bar:
        loss, norm = _step(run, optimizer, windows, settings, step, device)
        done, tokens = step + 1, settings.tokens_at(step + 1)
        log.steps.append({"step": done, "tokens": tokens, "loss": loss, "norm": norm, "rate": settings.rate_at(step)})
        late, last = time.monotonic() > schedule.deadline, done == settings.steps
        looks, saves = last or done % schedule.evaluate_every == 0, late or last or done % schedule.save_every == 0
        if looks or saves or len(log.steps) == schedule.log_every:
            bar.set_postfix_str(log.write_steps(settings.tokens_at(1)))
        if looks:
            log.write(step=done, tokens=tokens, heldout=_heldout(run, heldout, settings, schedule, device))
        if look and (last or done % schedule.diagnose_every == 0):
            batch = windows.batch(done * settings.batch, settings.micro_batch, device)
            look(lambda watched, batch=batch: _loss(watched, batch, device).backward()).write(out / "diagnosis", name=f"step_{done:06}")
        if saves:
            checkpoint.save(place.saved, model, optimizer, done)
        if done in schedule.keep:
            checkpoint.save(place.kept(done), model, optimizer, done)
        if late:
            break
    return done == settings.steps


def _adamw(model: nn.Module, settings: Settings, device: str) -> torch.optim.Optimizer:
    """Matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=device != "cpu")


def _step(
    run: Any, optimizer: torch.optim.Optimizer, windows: Windows, settings: Settings, step: int, device: str
) -> tuple[Tensor, Tensor]:
    """One optimizer step. Returns the mean loss in nats a token and the norm of the gradient before clipping, both ()."""
    for group in optimizer.param_groups:
        group["lr"] = settings.rate_at(step)
    total = torch.zeros((), device=device)
    for part in range(settings.accumulation):
        first = step * settings.batch + part * settings.micro_batch
        loss = _loss(run, windows.batch(first, settings.micro_batch, device), device) / settings.accumulation
        loss.backward()
        total += loss.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def _loss(run: Any, batch: Batch, device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16):
        return run(*batch)


def _heldout(run: Any, windows: Windows, settings: Settings, schedule: Schedule, device: str) -> float:
    """Mean loss on the held-out text, in the precision that the recipe evaluates in."""
    size = settings.micro_batch
    count = max(min(len(windows), schedule.heldout // settings.sequence) // size, 1)
    with torch.no_grad():
        losses = [_loss(run, windows.in_order(part * size, size, device), device) for part in range(count)]
    return torch.stack(losses).mean().item()


# Sequences a step and a micro-batch, their length, peak rate, tokens: 30m and 100m as in arXiv 2601.22813, with 2^18 tokens a step.
DEFAULTS = {
    "test": (4, 2, 64, 3e-3, "3k"),
    "cpu": (8, 8, 128, 5e-3, "200k"),
    "30m": (512, 128, 512, 1.2e-3, "100M"),
    "100m": (512, 64, 512, 9e-4, "250M"),
}


def main(argv: Sequence[str] | None = None) -> str:
    """Returns the table of final losses."""
    args = _arguments(argv)
    started = time.monotonic()
    # Else the embedding's gradient is summed in whatever order threads arrive, and no two runs agree in the last bits.
    torch.use_deterministic_algorithms(args.deterministic or args.device == "cpu")
    settings = _settings(args)
    _claim(args.out, settings)
    deadline = started + 60 * args.limit_minutes
    for name in args.recipe:
        if time.monotonic() > deadline and name != args.recipe[0]:
            print(f"{name}: no time left. The same command goes on from here.")
            continue
        schedule = Schedule(
            deadline=deadline,
            log_every=args.log_every,
            save_every=args.save_every,
            evaluate_every=args.evaluate_every or max(settings.steps // 10, 1),
            heldout=_count(args.heldout_tokens),
            diagnose_every=args.diagnose_every,
            keep=tuple(args.keep),
        )
        saved = (args.checkpoints or args.out) / name / "checkpoint.pt"
        place = Place(data=args.data, out=args.out / name, saved=saved, begin_from=args.begin_from)
        torch._dynamo.reset()
        if not train(settings, RECIPES[name], schedule, place, args.device):
            print(f"{name}: out of time, saved. The same command goes on from here.")
    table = write_comparison(args.out)
    print(table)
    return table


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_text.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, curves and the table")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints, if not --out")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["bf16", "nvfp4_train"], help="run one after the other")
    parser.add_argument("--tokens", help="token budget, as 400k or 100M")
    parser.add_argument("--batch", type=int, help="sequences in an optimizer step")
    parser.add_argument("--micro-batch", type=int, help="sequences in one forward and backward")
    parser.add_argument("--sequence", type=int, help="tokens in a sequence")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--decay", choices=("cosine", "wsd"), default="cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=10, help="steps that are written together; their losses are read at once")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, nargs="+", default=[], help="steps whose checkpoints stay, as checkpoint_STEP.pt")
    parser.add_argument("--begin-from", type=Path, help="a checkpoint that --keep left: what its run did until then is not done again")
    parser.add_argument("--evaluate-every", type=int, help="steps between looks at the held-out text; default: ten looks")
    parser.add_argument("--heldout-tokens", default="256k", help="how much of it")
    parser.add_argument("--diagnose-every", type=int, default=0, help="steps between diagnoses of the quantization; 0: none")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="save and stop after this time, all recipes together")
    parser.add_argument("--deterministic", action="store_true", help="on CUDA: equal runs to the last bit, slower")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.begin_from and not args.begin_from.exists():
        parser.error(f"--begin-from {args.begin_from}: no such checkpoint; its run leaves it under --keep STEP.")
    return args


def _settings(args: argparse.Namespace) -> Settings:
    batch, micro_batch, sequence, rate, tokens = DEFAULTS[args.size]
    batch = args.batch or batch
    return Settings(
        size=args.size,
        tokens=_count(args.tokens or tokens),
        batch=batch,
        micro_batch=min(args.micro_batch or micro_batch, batch),
        sequence=args.sequence or sequence,
        rate=args.rate or rate,
        warmup=args.warmup,
        decay=args.decay,
        seed=args.seed,
        vocabulary=json.loads((args.data / "settings.json").read_text())["vocabulary"],
    )


def _count(text: str) -> int:
    """400k, 100M, or plain digits."""
    unit = {"k": 1_000, "M": 1_000_000, "G": 1_000_000_000}.get(text[-1])
    return round(float(text[:-1]) * unit) if unit else int(text)


def _claim(out: Path, settings: Settings) -> None:
    """Refuse to compare, or to go on with, runs of other settings."""
    out.mkdir(parents=True, exist_ok=True)
    note, text = out / "settings.json", json.dumps(asdict(settings))
    if note.exists() and note.read_text() != text:
        raise OtherRun(f"{out} holds runs with {note.read_text()}, now asked for {text}; choose another --out.")
    note.write_text(text)


if __name__ == "__main__":
    main()
