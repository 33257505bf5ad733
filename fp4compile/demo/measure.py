"""What is measured of a model: per-token loss on text, time of a window, greedy text, time of a decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.demo.model import require

Forward = Callable[..., Any]  # a causal language model of transformers, compiled or not
Tick = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """nll: (windows, 511) float32, the loss of every token but each window's first. Seconds a call; the first one compiles."""

    nll: Tensor
    seconds: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return self.nll.mean().exp().item()

    @property
    def first_seconds(self) -> float:
        return self.seconds[0]

    @property
    def steady_seconds(self) -> float:
        """The best call: rows are measured minutes apart, and whatever else the machine does only ever adds time."""
        return min(self.seconds[1:])


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy continuation of a prompt; seconds a step, the first of which compiles."""

    text: str
    seconds: tuple[float, ...]

    @property
    def first_seconds(self) -> float:
        return self.seconds[0]

    @property
    def tokens_per_second(self) -> float:
        return 1 / min(self.seconds[1:])


@torch.no_grad()
def score_text(forward: Forward, windows: Tensor, tick: Tick) -> TextScore:
    """Loss of `forward` on `windows` (count, length) int64, one window a call, after a first call on the first one that only compiles."""
    losses, seconds = [], []
    for window in (windows[0], *windows):
        logits, elapsed = timed(lambda window=window: forward(input_ids=window[None], use_cache=False).logits)
        losses.append(_token_losses(logits, window))
        seconds.append(elapsed)
        tick()
    return TextScore(nll=torch.stack(losses[1:]), seconds=tuple(seconds))


@torch.no_grad()
def eager_losses(model: Forward, windows: Tensor, tick: Tick) -> Tensor:
    """The same of a model that has nothing to compile: (windows, length - 1)."""
    losses = []
    for window in windows:
        losses.append(_token_losses(model(input_ids=window[None], use_cache=False).logits, window))
        tick()
    return torch.stack(losses)


@torch.no_grad()
def generate(model: Any, forward: Forward, tokenizer: Any, prompt: str, count: int, tick: Tick) -> Generation:
    """`count` greedy tokens after `prompt`, through a static cache. The prompt goes in token by token: one graph serves all steps."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    steps = len(ids) + count - 1
    cache = _static_cache(model, steps)
    seconds = []
    for position in range(steps):
        token = torch.tensor([[ids[position]]], device=model.device)
        logits, elapsed = timed(lambda token=token: forward(input_ids=token, past_key_values=cache, use_cache=True).logits)
        seconds.append(elapsed)
        if position == len(ids) - 1:
            ids.append(int(logits[0, -1].argmax()))
        tick()
    return Generation(text=tokenizer.decode(ids), seconds=tuple(seconds))


def loss_increase(score: TextScore, baseline: TextScore) -> tuple[float, float]:
    """Mean of the per-token difference to `baseline` on the same text, and the standard error of that mean over tokens."""
    difference = (score.nll - baseline.nll).flatten()
    return difference.mean().item(), (difference.std() / difference.numel() ** 0.5).item()


def _token_losses(logits: Tensor, window: Tensor) -> Tensor:
    """(length - 1,) float32 on the CPU."""
    return F.cross_entropy(logits[0, :-1].float(), window[1:], reduction="none").cpu()


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result, time.perf_counter() - start


def _static_cache(model: Any, length: int) -> Any:
    """Allocated before the first call, so that compiled code never sees a cache without memory."""
    config = model.config
    cache = require("transformers").StaticCache(config, max_cache_len=length)
    cache.early_initialization(
        batch_size=1, num_heads=config.num_key_value_heads, head_dim=config.head_dim, dtype=model.dtype, device=model.device
    )
    return cache
