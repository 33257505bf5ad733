"""A Llama small enough for a test, the GGUF file it would be packed into, and a tokenizer for it."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = ["<|end|>", "<|start|>", *LETTERS, "Ġ", *"0123456789", "Ċ", "th", "the", "Ġt", "00"]
MERGES = ["t h", "th e", "Ġ t", "0 0"]


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    return model


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """As llama.cpp's converter writes it: other names, q and k permuted, the tied head left out."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = weight.numpy() if heads is None else permuted_for_ggml(weight, heads).numpy()
        writer.add_tensor(_gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted_for_ggml(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i of a head is row i of the first half, row 2i + 1 is row i of the second half: spelled out, row by row."""
    size = weight.shape[0] // heads
    rows = [weight[head * size + (i % 2) * (size // 2) + i // 2] for head in range(heads) for i in range(size)]
    return torch.stack(rows)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{TO_GGUF[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{TO_GGUF[inner]}.weight"
