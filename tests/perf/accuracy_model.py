"""SmolLM2-135M from what `accuracy_pack.py` wrote: the blocks of a GGUF file decoded in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor

from fp4compile.demo.model import hf_name, undo_rope_permutation

WINDOW: Final = 512


def load_packed(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The model in float32, in eval mode, and for each text its windows (count, 512) int64."""
    parts = [torch.load(folder / part / "part.pt", weights_only=True) for part in ("a", "b")]
    config = transformers.LlamaConfig(**parts[0]["config"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {}
    for name, (kind, data) in (item for part in parts for item in part["blocks"].items()):
        weight = decoded(kind, data)
        if ".attn_q." in name or ".attn_k." in name:
            weight = undo_rope_permutation(weight, config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads)
        state[hf_name(name)] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no checkpoint
    return model.eval().requires_grad_(False), {name: windows.long() for name, windows in parts[0]["tokens"].items()}


def decoded(kind: str, data: Tensor) -> Tensor:
    """float32 values of a GGUF tensor: F32 as it is; else uint8 (rows, bytes) of blocks of 32 elements along a row.

    Q4_1: half d, half m, 16 bytes of two codes q, the first 16 elements low; d q + m. Q8_0: half d, 32 int8 codes q; d q.
    """
    if kind == "F32":
        return data.view(torch.float32)
    size = {"Q4_1": 20, "Q8_0": 34}[kind]
    blocks = data.unflatten(-1, (-1, size))
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    if kind == "Q8_0":
        return (d * blocks[..., 2:].contiguous().view(torch.int8).float()).flatten(-2)
    m = blocks[..., 2:4].contiguous().view(torch.float16).float()
    codes = blocks[..., 4:]
    return (d * torch.cat([codes & 15, codes >> 4], dim=-1).float() + m).flatten(-2)
