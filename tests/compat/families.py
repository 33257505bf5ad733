"""Model families as people use them: real classes built from tiny configurations, random weights, a few tokens of input.

Widths are no multiples of 16 where the real models' are not: heads of Gemma, vocabularies, patches, token counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[nn.Module, int, int], dict[str, Any]]  # model, batch, length -> keyword arguments


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model. `labels` makes the model compute its own loss, as a training script would."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    labels: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    output: Callable[[Any], Tensor] = lambda out: out[0] if isinstance(out, tuple) else out.logits
    dtype: torch.dtype = torch.float32
    needs: tuple[str, ...] = ("transformers",)
    length: int = 12
    kept: tuple[str, ...] = ()  # layers that the preset leaves alone, layer numbers as `*`
    known: tuple[str, ...] = ()  # those that the graph itself shows to be routers or tied heads
    same_code: bool = True  # False: under torch.compile the model takes another branch than in eager mode


def tokens(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, model.config.vocab_size, (batch, length)), "use_cache": False}


def tokens_alone(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, model.config.vocab_size, (batch, length))}


def as_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "labels": inputs["input_ids"]}


TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
GROUPED_QUERY = {**TEXT, "num_key_value_heads": 2}


def causal(kind: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, f"{kind}Config")(**config)
        return getattr(transformers, f"{kind}ForCausalLM")(made)

    return build


def of(kind: str, head: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**config))

    return build


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0)
    )


def t5_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    ids = torch.randint(0, 100, (batch, length))
    return {"input_ids": ids, "decoder_input_ids": ids[:, : length - 3], "use_cache": False}


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "eos_token_id": 99,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=40))


def clip_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 98, (batch, length)), "pixel_values": torch.randn(batch, 3, 28, 28)}


def pixels(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 42, 42)}


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def dit_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": torch.arange(batch),
        "class_labels": torch.arange(batch),
        "return_dict": False,
    }


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=40, pooled_projection_dim=36, axes_dims_rope=(8, 8, 8), guidance_embeds=False,
    )  # fmt: skip


def flux_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 16, 16),
        "encoder_hidden_states": torch.randn(batch, length, 40),
        "pooled_projections": torch.randn(batch, 36),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(length, 3),
        "return_dict": False,
    }


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=40, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def unet_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.arange(batch),
        "encoder_hidden_states": torch.randn(batch, length, 40),
        "return_dict": False,
    }


def timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return build


def timm_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, *model.default_cfg["input_size"][1:])}


MOE = {**GROUPED_QUERY, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}
GEMMA = {**GROUPED_QUERY, "head_dim": 12, "sliding_window": 8}
VIT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 42, "patch_size": 6}
MAMBA = {"hidden_size": 48, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 100, "time_step_rank": 3}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 101,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FALCON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
OPT = {**FALCON, "ffn_dim": 80, "word_embed_proj_dim": 48, "dropout": 0.0}
GPT_OSS = {**GROUPED_QUERY, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 8}


def _text(name: str, build: Callable[[], nn.Module], **other: Any) -> Family:
    return Family(name=name, build=build, inputs=tokens, labels=as_labels, **other)


FAMILIES = (
    _text("llama", causal("Llama", **GROUPED_QUERY), kept=("lm_head",)),
    _text(
        "llama tied, bias",
        causal("Llama", **GROUPED_QUERY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        kept=("lm_head",),
        known=("lm_head",),
    ),
    _text("mistral", causal("Mistral", **GROUPED_QUERY, sliding_window=8), kept=("lm_head",)),
    _text("qwen2", causal("Qwen2", **GROUPED_QUERY), kept=("lm_head",)),
    _text("qwen3", causal("Qwen3", **GROUPED_QUERY, head_dim=12), kept=("lm_head",)),
    _text("gemma2", causal("Gemma2", **GEMMA), kept=("lm_head",), known=("lm_head",)),
    _text("gemma3", gemma3, kept=("lm_head",), known=("lm_head",)),
    _text("phi3", causal("Phi3", **GROUPED_QUERY, pad_token_id=0), kept=("lm_head",)),
    _text("gpt2", of("GPT2", "LMHeadModel", **GPT2), kept=("lm_head",), known=("lm_head",)),
    _text("gpt-neox", of("GPTNeoX", "ForCausalLM", **TEXT), kept=("lm_head",)),
    _text("opt", causal("OPT", **OPT), kept=("lm_head",), known=("lm_head",)),
    _text("falcon", causal("Falcon", **FALCON), kept=("lm_head",), known=("lm_head",)),
    _text("mamba", causal("Mamba", **MAMBA), length=4, same_code=False, kept=("lm_head",), known=("lm_head",)),
    _text(
        "mixtral",
        causal("Mixtral", **GROUPED_QUERY, num_local_experts=4, num_experts_per_tok=2),
        dtype=torch.bfloat16,
        kept=("lm_head", "model.layers.*.mlp.gate"),
        known=("model.layers.*.mlp.gate",),
    ),
    _text(
        "qwen3-moe",
        causal("Qwen3Moe", **MOE),
        dtype=torch.bfloat16,
        kept=("lm_head", "model.layers.*.mlp.gate"),
        known=("model.layers.*.mlp.gate",),
    ),
    _text(
        "gpt-oss",
        causal("GptOss", **GPT_OSS),
        dtype=torch.bfloat16,
        kept=("lm_head", "model.layers.*.mlp.router"),
        known=("model.layers.*.mlp.router",),
    ),
    Family(
        name="bert",
        build=of("Bert", "ForMaskedLM", **TEXT, **DROPLESS),
        inputs=tokens_alone,
        labels=as_labels,
        kept=("cls.predictions.decoder",),
        known=("cls.predictions.decoder",),
    ),
    Family(
        name="modernbert",
        build=of("ModernBert", "ForMaskedLM", **TEXT, pad_token_id=0),
        inputs=tokens_alone,
        labels=as_labels,
        kept=("decoder",),
        known=("decoder",),
    ),
    Family(name="t5", build=t5, inputs=t5_inputs, kept=("lm_head",), known=("lm_head",)),
    Family(name="vit", build=of("ViT", "ForImageClassification", **VIT, num_labels=10), inputs=pixels, kept=("classifier",)),
    Family(name="clip", build=clip, inputs=clip_inputs, output=lambda out: out.logits_per_image),
    Family(
        name="dit",
        build=dit,
        inputs=dit_inputs,
        needs=("diffusers",),
        kept=(
            "proj_out_1",
            "proj_out_2",
            "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1",
            "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2",
            "transformer_blocks.*.norm1.linear",
        ),
    ),
    Family(
        name="flux",
        build=flux,
        inputs=flux_inputs,
        needs=("diffusers",),
        kept=(
            "context_embedder",
            "norm_out.linear",
            "proj_out",
            "single_transformer_blocks.*.norm.linear",
            "time_text_embed.text_embedder.linear_1",
            "time_text_embed.text_embedder.linear_2",
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.timestep_embedder.linear_2",
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "x_embedder",
        ),
    ),
    Family(
        name="unet",
        build=unet,
        inputs=unet_inputs,
        needs=("diffusers",),
        kept=(
            "down_blocks.*.resnets.*.time_emb_proj",
            "mid_block.resnets.*.time_emb_proj",
            "time_embedding.linear_1",
            "time_embedding.linear_2",
            "up_blocks.*.resnets.*.time_emb_proj",
        ),
    ),
    Family(
        name="timm vit",
        build=timm_model("test_vit"),
        inputs=timm_inputs,
        output=lambda out: out,
        kept=("head",),
        needs=("torchvision", "timm"),
    ),
    Family(
        name="timm resnet",
        build=timm_model("test_resnet"),
        inputs=timm_inputs,
        output=lambda out: out,
        kept=("fc",),
        needs=("torchvision", "timm"),
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
