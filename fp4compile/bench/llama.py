"""Decoder layers of a Llama in plain PyTorch: what is compiled to answer how much faster a model gets. No other package is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads


LLAMAS: Final = {
    "tiny": LlamaShape(hidden=64, intermediate=192, heads=4, kv_heads=2),
    "135m": LlamaShape(hidden=576, intermediate=1536, heads=9, kv_heads=3),
    "1b": LlamaShape(hidden=2048, intermediate=8192, heads=32, kv_heads=8),
    "8b": LlamaShape(hidden=4096, intermediate=14336, heads=32, kv_heads=8),
    "70b": LlamaShape(hidden=8192, intermediate=28672, heads=64, kv_heads=8),
}


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings. With `context` it keeps keys and values of that many positions and of one new."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: LlamaShape, context: int) -> None:
        super().__init__()
        self.shape, self.context = shape, context
        wide, narrow = shape.heads * shape.head, shape.kv_heads * shape.head
        self.q_proj = nn.Linear(shape.hidden, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden, bias=False)
        if context:
            for name in ("keys", "values"):
                self.register_buffer(name, torch.randn(1, shape.kv_heads, context + 1, shape.head), persistent=False)

    def forward(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(1, T, hidden) in and out; `position` (T,) int64; `cos`, `sin` (T, head)."""
        q, k, v = (self._heads(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if self.context:
            k, v = self.keys.index_copy_(2, position, k), self.values.index_copy_(2, position, v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=not self.context, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head)).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, shape: LlamaShape, context: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.self_attn = Attention(shape, context)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderLayers(nn.Module):
    """`layers` decoder layers after one another, in bfloat16, with random weights of a trained model's size."""

    def __init__(self, shape: LlamaShape, *, layers: int, context: int) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(DecoderLayer(shape, context) for _ in range(layers))

    @classmethod
    def build(cls, name: str, *, layers: int, context: int, device: torch.device) -> DecoderLayers:
        torch.manual_seed(0)
        with device:
            model = cls(LLAMAS[name], layers=layers, context=context)
        return model.bfloat16().eval().requires_grad_(False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        half = torch.arange(0, self.shape.head, 2, device=x.device, dtype=torch.float32)
        angle = position[:, None].float() * 500_000.0 ** (-half / self.shape.head)
        cos, sin = (f(torch.cat((angle, angle), -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        for layer in self.layers:
            x = layer(x, position, cos, sin)
        return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
