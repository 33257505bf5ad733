"""A Llama-like decoder of a few thousand parameters, written as people write one: the model that training tests train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class RmsNorm(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = RmsNorm(width, dtype), RmsNorm(width, dtype)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False, dtype=dtype))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False, dtype=dtype) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)
        q, k, v = (proj(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.o_proj(attended)
        normed = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Llama(nn.Module):
    """Tokens (B, T) to scores (B, T, vocabulary)."""

    def __init__(
        self, *, layers: int = 2, width: int = 32, inner: int = 80, vocabulary: int = 48, dtype: torch.dtype = torch.float32,
        tied: bool = False, checkpointed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype)
        self.blocks = nn.ModuleList(Block(width, 2, inner, dtype) for _ in range(layers))
        self.norm, self.out = RmsNorm(width, dtype), nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        self.checkpointed = checkpointed
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.out(self.norm(x))


def loss_of(run, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each next token, in float32."""
    scores = run(tokens[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())
