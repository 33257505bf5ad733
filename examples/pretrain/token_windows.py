"""Tokens on disk as batches of windows: memory-mapped, and in an order that is a function of seed and step alone."""

from __future__ import annotations

import functools
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # tokens and targets, (sequences, length) int64


class NoTokens(RuntimeError):
    """The data folder holds no tokens."""


def open_tokens(folder: Path, part: str) -> np.ndarray:
    """uint16 tokens of `part` ("train" or "heldout"); `*.u16.xz` of `prepare_text.py --pack` is unpacked beside itself first."""
    path, packed = folder / f"{part}.u16", folder / f"{part}.u16.xz"
    if not path.exists() and packed.exists():
        low_and_high = np.frombuffer(lzma.decompress(packed.read_bytes()), dtype=np.uint8).reshape(2, -1)
        path.with_suffix(".partial").write_bytes(np.ascontiguousarray(low_and_high.T).tobytes())
        path.with_suffix(".partial").replace(path)
    if not path.exists():
        raise NoTokens(
            f"{folder} has neither {path.name} nor {packed.name}: make them with examples/pretrain/prepare_text.py --data {folder}"
        )
    return np.memmap(path, dtype=np.uint16, mode="r")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Non-overlapping windows of `length` tokens; a batch is its tokens and, as targets, those one place on."""

    tokens: np.ndarray
    length: int
    seed: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def batch(self, first: int, count: int, device: str) -> Batch:
        """Windows number `first` to `first + count` of the endless shuffled order, a new permutation every epoch."""
        rows = np.stack([self._window(self._shuffled(i)) for i in range(first, first + count)])
        return _on_device(rows, device)

    def in_order(self, first: int, count: int, device: str) -> Batch:
        """The same without shuffling, for held-out text."""
        return _on_device(np.stack([self._window(i) for i in range(first, first + count)]), device)

    def _shuffled(self, index: int) -> int:
        epoch, place = divmod(index, len(self))
        return int(_permutation(len(self), self.seed + epoch)[place])

    def _window(self, index: int) -> np.ndarray:
        start = index * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int64)


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def _on_device(rows: np.ndarray, device: str) -> Batch:
    whole = torch.from_numpy(rows)
    if device != "cpu":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
