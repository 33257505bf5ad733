"""A small Llama-like model in plain PyTorch: RMSNorm, rotary attention, gated MLP, untied head. It knows nothing of 4 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths are multiples of 128: whole tiles of every kernel, as in models worth training."""

    width: int
    layers: int
    heads: int
    hidden: int  # of the MLP


# 30m and 100m have the depth and width of the runs of arXiv 2601.22813, whose gaps to bf16 they can be held against.
SIZES = {
    "test": Shape(width=128, layers=1, heads=2, hidden=128),
    "cpu": Shape(width=128, layers=4, heads=2, hidden=384),
    "30m": Shape(width=640, layers=6, heads=10, hidden=1792),
    "100m": Shape(width=1024, layers=8, heads=16, hidden=2816),
}


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, eps=1e-5).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(_rotated(q, rotation), _rotated(k, rotation), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(shape.width), RMSNorm(shape.width)
        self.self_attn, self.mlp = Attention(shape), MLP(shape)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """`forward(tokens, targets)`, both (batch, at most `sequence`) int64, is the mean cross entropy in nats a token; without targets, the
    logits (batch, length, vocabulary).

    Parameters are float32, the master weights of the recipe; under autocast the matmuls read bfloat16 copies and the residual stream is
    bfloat16 too.
    """

    def __init__(self, shape: Shape, vocabulary: int, sequence: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, vocabulary, bias=False)
        self.rotation: Tensor  # not part of a checkpoint
        self.register_buffer("rotation", _rotation(sequence, shape.width // shape.heads), persistent=False)
        self._initialize(shape)

    def _initialize(self, shape: Shape) -> None:
        std = math.sqrt(2 / (5 * shape.width))  # arXiv 1910.05895: 0.02 at width 1000, and more for narrower models
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / (math.sqrt(2 * shape.layers) if into_stream else 1))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x, self.rotation[:, : tokens.shape[1]])
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _rotation(sequence: int, head: int) -> Tensor:
    """(2, sequence, head/2): cosines and sines of the rotary embedding."""
    frequency = 10_000.0 ** (-torch.arange(0, head, 2) / head)
    angle = torch.outer(torch.arange(sequence), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
