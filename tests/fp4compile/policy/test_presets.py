"""What the presets decide for models as they are named in the wild."""

from __future__ import annotations

import tomllib

import pytest

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.target import Target
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.load import load_policy
from fp4compile.policy.presets import list_presets, preset_names
from fp4compile.policy.rule import PolicyNeedsTarget
from tests.fp4compile.policy.sites import llama, site

A, W, G = OperandKind.ACTIVATION, OperandKind.WEIGHT, OperandKind.GRADIENT
FORWARD = {
    "nvfp4": {A: QuantConfig(), W: QuantConfig()},
    "nvfp4_a16": {W: QuantConfig()},
    "nvfp4_accurate": {A: QuantConfig(scale_rule="four_over_six"), W: QuantConfig(scale_rule="sweep")},
    "mxfp4": {A: QuantConfig(format="mxfp4"), W: QuantConfig(format="mxfp4")},
    "mxfp4_a16": {W: QuantConfig(format="mxfp4")},
    "nvfp4_train": {A: QuantConfig(), W: QuantConfig(block="16x16")},
    "bf16": {},
}
HOPPER, BLACKWELL = Target(name="sm_90", device_type="cuda", capability=90), Target(name="sm_120", device_type="cuda", capability=120)
CPU = Target(name="cpu", device_type="cpu")


def decide(policy, *sites, training=False):
    return load_policy(policy).decide(list(sites), training=training)


def test_the_presets_are_listed_with_their_descriptions():
    names = ["auto", "bf16", "mxfp4", "mxfp4_a16", "nvfp4", "nvfp4_a16", "nvfp4_accurate", "nvfp4_train"]
    assert [name for name, _ in list_presets()] == names
    assert all(description for _, description in list_presets())


@pytest.mark.parametrize("name", FORWARD)
def test_forward_of_each_preset(name):
    (decision,) = decide(name, site("model.layers.0.mlp.up_proj", layers=20))
    assert decision.configs == load_policy(name).base == FORWARD[name]
    assert (decision.rule, decision.reason) == (f"preset {name}, [default]", f"default of preset {name}")


@pytest.mark.parametrize("name", sorted(set(FORWARD) - {"nvfp4_train"}))
def test_without_a_training_section_the_backward_stays_high_and_says_so(name):
    for decision in decide(name, site("up", Role.DGRAD), site("up", Role.WGRAD), training=True):
        assert decision.configs == {}
        assert decision.reason.startswith("backward in high precision (straight-through): [training] leaves out")


def test_nvfp4_accurate_leaves_keys_and_values_alone():
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"):
        (decision,) = decide("nvfp4_accurate", site(name, layers=20))
        assert decision.configs == {} and decision.reason == "key or value projection, the most sensitive for its size"
    (query,) = decide("nvfp4_accurate", site("model.layers.0.self_attn.q_proj", layers=20))
    assert query.configs == FORWARD["nvfp4_accurate"]


def test_nvfp4_train_is_the_recipe():
    """Table of arXiv 2509.25149, section 1(a): nearest 1x16 activations, 16x16 weights, SR gradients, Hadamard 16 on wgrad alone."""
    sites = [site("up", role, depth=3, layers=20) for role in (Role.FPROP, Role.DGRAD, Role.WGRAD)]
    fprop, dgrad, wgrad = decide("nvfp4_train", *sites, training=True)
    assert fprop.configs == {A: QuantConfig(), W: QuantConfig(block="16x16")}
    assert dgrad.configs == {G: QuantConfig(rounding="stochastic"), W: QuantConfig(block="16x16")}
    assert wgrad.configs == {G: QuantConfig(rounding="stochastic", hadamard=16), A: QuantConfig(hadamard=16)}
    assert wgrad.rule == "preset nvfp4_train, [training] wgrad"


@pytest.mark.parametrize("role", [Role.FPROP, Role.DGRAD, Role.WGRAD])
def test_nvfp4_train_keeps_the_last_15_percent_of_the_layers(role):
    decisions = decide("nvfp4_train", *(site("up", role, depth=i, layers=20) for i in range(20)), training=True)
    assert [i for i, decision in enumerate(decisions) if not decision.configs] == [17, 18, 19]
    assert "last 15%" in decisions[19].reason


HIGH = [
    ("lm_head", "output head"),
    ("language_model.lm_head", "output head"),
    ("roberta.lm_head.decoder", "output head"),
    ("embed_out", "output head"),
    ("transformer.output_layer", "output head"),
    ("cls.predictions.decoder", "output head"),
    ("proj_out", "output head"),
    ("proj_out_2", "output head"),
    ("output", "output head"),
    ("decoder", "output head"),
    ("score", "classifier head"),
    ("classifier", "classifier head"),
    ("qa_outputs", "classifier head"),
    ("head", "classifier head"),
    ("fc", "classifier head"),
    ("vit.embeddings.patch_embeddings.projection", "embedding"),
    ("patch_embed.proj", "embedding"),
    ("model.embed_tokens", "embedding"),
    ("model.layers.0.block_sparse_moe.gate", "router or expert gate"),
    ("model.layers.0.mlp.gate", "router or expert gate"),
    ("model.layers.0.mlp.router", "router or expert gate"),
    ("encoder.block.1.layer.1.mlp.router.classifier", "router or expert gate"),
    ("model.layers.0.mlp.shared_expert_gate", "router or expert gate"),
    ("model.layers.0.linear_attn.in_proj_a", "state-space or linear attention input"),
    ("backbone.layers.0.mixer.conv1d", "state-space or linear attention input"),
    ("model.vision_tower.encoder.layers.0.mlp.fc1", "vision tower or projector of a multimodal model"),
    ("visual.blocks.0.attn.qkv", "vision tower or projector of a multimodal model"),
    ("transformer_blocks.0.norm1.linear", "conditioning of a diffusion model"),
    ("time_text_embed.timestep_embedder.linear_1", "conditioning of a diffusion model"),
    ("model.mtp.layers.0.mlp.up_proj", "multi-token prediction head"),
]
QUANTIZED = [
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.gate_up_proj",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.shared_expert.gate_proj",
    "single_transformer_blocks.0.proj_out",
    "bert.encoder.layer.0.output.dense",
    "decoder.block.0.layer.0.SelfAttention.q",
    "vision_model.encoder.layers.0.mlp.fc1",
    "transformer.h.0.attn.c_attn",
    "model.layers.0.linear_attn.in_proj_qkvz",
    "backbone.layers.0.mixer.in_proj",
    "linear1",
    "",
]


@pytest.mark.parametrize("preset", sorted(set(preset_names()) - {"auto", "bf16"}))
@pytest.mark.parametrize(("module", "reason"), HIGH)
def test_what_every_peer_leaves_alone_is_left_alone_in_every_role(preset, module, reason):
    for decision in decide(preset, *(site(module, role, layers=20) for role in (Role.FPROP, Role.DGRAD, Role.WGRAD)), training=True):
        assert decision.configs == {}
        assert decision.reason == reason


@pytest.mark.parametrize("module", QUANTIZED)
def test_names_that_only_look_like_an_exception_are_quantized(module):
    assert decide("nvfp4", site(module))[0].configs


@pytest.mark.parametrize(
    ("trait", "reason"), [("tied", "shares its weight with an embedding"), ("router", "decides which expert a token goes to")]
)
def test_traits_of_the_graph_need_no_names(trait, reason):
    (decision,) = decide("nvfp4", site("unusual.name", traits=frozenset({trait})))
    assert (decision.configs, decision.reason) == ({}, reason)


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_train", "bf16"])
def test_products_of_two_activations_are_left_alone(preset):
    for decision in decide(preset, site("layers.0.self_attn", Role.MATMUL, op="bmm"), training=True):
        assert decision.configs == {}
        assert "two activations" in decision.reason


def test_a_llama_is_quantized_but_for_head_and_attention():
    sites = llama(3)
    high = [s.name for s, decision in zip(sites, decide("nvfp4", *sites), strict=True) if not decision.configs]
    assert set(high) == {"lm_head", *(f"model.layers.{i}.self_attn" for i in range(3))}


@pytest.mark.parametrize(("target", "name"), [(BLACKWELL, "nvfp4"), (HOPPER, "nvfp4_a16"), (CPU, "nvfp4_a16")])
def test_auto_asks_the_device_in_inference(target, name):
    resolved = load_policy("auto").resolve_for(target)
    assert resolved.name == f"auto -> {name}"
    assert resolved.decide(llama(), training=False) == load_policy(name).decide(llama(), training=False)


@pytest.mark.parametrize("target", [BLACKWELL, HOPPER, CPU])
def test_auto_trains_as_nvfp4_train_on_every_device(target):
    expected = load_policy("nvfp4_train").decide(llama(training=True), training=True)
    found = load_policy("auto").resolve_for(target).decide(llama(training=True), training=True)
    assert [d.configs for d in found] == [d.configs for d in expected]
    assert [d.reason for d in found] == [d.reason for d in expected]
    assert load_policy("auto").resolve_for(target, training=True).name == "auto -> nvfp4_train"


def test_only_auto_depends_on_the_device():
    for name in set(preset_names()) - {"auto"}:
        policy = load_policy(name)
        assert policy.resolve_for(BLACKWELL) is policy.resolve_for(CPU) is policy


def test_auto_decides_nothing_before_it_knows_the_device():
    with pytest.raises(PolicyNeedsTarget, match=r"policy 'auto' depends on the device .* Call policy\.resolve_for\(target\) first\."):
        load_policy("auto").decide(llama(), training=False)


@pytest.mark.parametrize("name", preset_names())
def test_the_resolved_text_reads_back_to_an_equal_policy(name):
    policy = load_policy(name)
    for each in (policy, *(policy.choices.all if policy.choices else ())):
        again = load_policy(tomllib.loads(each.to_toml()))
        assert again == each
        assert again.fingerprint() == each.fingerprint()


def test_fingerprints_tell_policies_apart():
    fingerprints = [load_policy(name).fingerprint() for name in preset_names()]
    fingerprints += [policy.fingerprint() for policy in load_policy("auto").choices.all]
    assert len(set(fingerprints)) == len(fingerprints)
