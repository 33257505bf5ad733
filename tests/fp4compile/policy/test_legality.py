"""Settings that contradict each other are refused when the policy is loaded, with place, reason and advice."""

from __future__ import annotations

import pytest

from fp4compile.codegen.errors import IllegalCombination
from fp4compile.policy.load import load_policy

ILLEGAL = {
    "EDEN in the forward": (
        {"extends": "nvfp4", "rule": [{"match": "x", "role": "fprop", "weight": {"rounding": "eden"}}]},
        "inline policy, rule 1 (fprop): rounding = eden on the weight of the forward. Training diverges with it",
    ),
    "EDEN without a rotation": (
        {"extends": "nvfp4", "training": {"wgrad": {"gradient": {"rounding": "eden"}}}},
        "inline policy, [training] wgrad (wgrad): rounding = eden on the gradient with hadamard = 0 and signs = fixed.",
    ),
    "EDEN under fixed signs": (
        {"extends": "nvfp4", "training": {"wgrad": {"hadamard": 128, "gradient": {"rounding": "eden"}}}},
        "inline policy, [training] wgrad (wgrad): rounding = eden on the gradient with hadamard = 128 and signs = fixed.",
    ),
    "EDEN with a scale chosen by its error": (
        {
            "extends": "nvfp4",
            "training": {"wgrad": {"hadamard": 128, "signs": "random", "activation": {"rounding": "eden", "scale_rule": "four_over_six"}}},
        },
        "inline policy, [training] wgrad (wgrad activation): rounding = eden with scale_rule = four_over_six. EDEN maps",
    ),
    "the forward's values in the forward": (
        {"default": {"precision": "w4a4", "weight": {"source": "forward"}}},
        'inline policy, [default] (fprop): source = "forward" on the weight. It lets the backward quantize',
    ),
    "the forward's values of a gradient": (
        {"extends": "nvfp4", "training": {"dgrad": {"gradient": {"source": "forward"}}}},
        'inline policy, [training] dgrad (dgrad): source = "forward" on the gradient. It lets the backward quantize',
    ),
    "stochastic weight in the forward": (
        {"extends": "nvfp4", "rule": [{"match": "a", "weight": {"rounding": "stochastic", "scale_rule": "amax"}}]},
        "inline policy, rule 1 (fprop): rounding = stochastic on the weight of the forward. Training diverges with it (arXiv 2509.25149)",
    ),
    "stochastic activation by default": (
        {"extends": "nvfp4", "default": {"activation": {"rounding": "stochastic"}}},
        "inline policy, [default] (fprop): rounding = stochastic on the activation of the forward.",
    ),
    "stochastic in a matmul of two activations": (
        {"extends": "nvfp4", "rule": [{"role": "matmul", "precision": "w4a4", "activation": {"rounding": "stochastic"}}]},
        "inline policy, rule 1 (matmul): rounding = stochastic on the activation of the forward.",
    ),
    "a scale each 1x128 of one operand": (
        {"extends": "nvfp4_a16", "default": {"weight": {"global_scale": "1x128"}}},
        "inline policy, [default] (fprop): global_scale = 1x128 on the weight with precision = w4a16. It is multiplied in between sums",
    ),
    "a scale each 1x128 and another format": (
        {"extends": "nvfp4", "default": {"activation": {"global_scale": "1x128"}, "weight": {"format": "mixfp4"}}},
        "inline policy, [default] (fprop): global_scale = 1x128 on the activation with format = mixfp4.",
    ),
    "rotation of a 2D weight": (
        {"extends": "nvfp4_train", "training": {"dgrad": {"hadamard": 16}}},
        "inline policy, [training] dgrad (dgrad weight): block = 16x16 with hadamard. "
        "A rotation breaks the codes that W and its transpose share. Use block = '1x16', or hadamard = 0.",
    ),
    "rotation of the gradient alone": (
        {"extends": "nvfp4_train", "training": {"dgrad": {"gradient": {"hadamard": 16}}}},
        "inline policy, [training] dgrad (dgrad): hadamard = 16 on the gradient and hadamard = 0 on the weight. "
        "A rotation cancels only if both operands of the matmul have the same one.",
    ),
    "two sizes of rotation": (
        {"extends": "nvfp4_train", "training": {"wgrad": {"gradient": {"hadamard": 64}}}},
        "inline policy, [training] wgrad (wgrad): hadamard = 64 on the gradient and hadamard = 16 on the activation.",
    ),
    "rotation of a weight whose activation is not quantized": (
        {"extends": "nvfp4_a16", "rule": [{"match": "a", "hadamard": 16}]},
        "inline policy, rule 1 (fprop): hadamard = 0 on the activation in high precision and hadamard = 16 on the weight.",
    ),
    "four over six on a stochastic gradient": (
        {"extends": "nvfp4_train", "training": {"dgrad": {"gradient": {"scale_rule": "four_over_six"}}}},
        "inline policy, [training] dgrad (dgrad gradient): scale_rule = four_over_six with rounding = stochastic. "
        "Choosing between two random draws is biased.",
    ),
    "two formats in one matmul": (
        {"extends": "nvfp4", "rule": [{"match": "a", "weight": {"format": "mxfp4"}}]},
        "inline policy, rule 1 (fprop): the operands of one matmul have the formats mxfp4 and nvfp4. Both must have one format",
    ),
    "two formats in the backward of a rule about the forward": (
        {"extends": "nvfp4_train", "rule": [{"match": "a", "activation": {"format": "mxfp4"}, "weight": {"format": "mxfp4"}}]},
        "inline policy, rule 1 (dgrad): the operands of one matmul have the formats mxfp4 and nvfp4.",
    ),
    "what QuantConfig refuses": (
        {"extends": "mxfp4", "rule": [{"match": "a", "weight": {"scale_rule": "four_over_six"}}]},
        "inline policy, rule 1 (fprop weight): scale_rule = four_over_six. MXFP4 scales are powers of two.",
    ),
    "static scale without its amax": (
        {"extends": "nvfp4", "default": {"activation": {"global_scale": "static"}}},
        "inline policy, [default] (fprop activation): global_scale = static with static_amax = None.",
    ),
    "tables under high": (
        {"extends": "nvfp4", "rule": [{"match": "a", "precision": "high", "weight": {"block": "16x16"}}]},
        'inline policy, rule 1: precision = "high", weight = { block = "16x16" } sets the weight, but no matmul that the rule covers has '
        'a 4-bit weight. The rule\'s own precision is "high"; precision = "w4a4" quantizes both operands.',
    ),
    "format under high": (
        {"extends": "nvfp4", "rule": [{"match": "a", "precision": "high", "format": "mxfp4"}]},
        'inline policy, rule 1: precision = "high", format = "mxfp4" quantizes nothing. Its precision is "high".',
    ),
    "tables over a default that is high": (
        {"extends": "bf16", "rule": [{"match": "a", "format": "mxfp4"}]},
        'inline policy, rule 1: format = "mxfp4" quantizes nothing. The precision it starts from, that of [default], is "high"; '
        'precision = "w4a4" quantizes both operands.',
    ),
    "activation under w4a16": (
        {"extends": "nvfp4_a16", "rule": [{"match": "a", "activation": {"global_scale": "row"}}]},
        'inline policy, rule 1: activation = { global_scale = "row" } sets the activation, but no matmul that the rule covers has a 4-bit '
        'activation. Its precision is "w4a16", under which only weights are 4-bit',
    ),
    "gradient without a quantized backward": (
        {"extends": "nvfp4", "rule": [{"match": "a", "gradient": {"rounding": "stochastic"}}]},
        'inline policy, rule 1: gradient = { rounding = "stochastic" } sets the gradient, but no matmul that the rule covers has a 4-bit '
        "gradient. Gradients are operands of dgrad and wgrad",
    ),
    "weight of wgrad": (
        {"extends": "nvfp4_train", "rule": [{"role": "wgrad", "weight": {"block": "1x16"}}]},
        'inline policy, rule 1: weight = { block = "1x16" } sets the weight, but no matmul that the rule covers has a 4-bit weight. '
        "No role it covers (wgrad) multiplies a weight.",
    ),
    "w4a16 for a matmul without a weight": (
        {"extends": "nvfp4", "rule": [{"role": "matmul", "precision": "w4a16"}]},
        'inline policy, rule 1: precision = "w4a16" quantizes nothing. Its precision is "w4a16", under which only weights are 4-bit',
    ),
    "w4a16 for wgrad": (
        {"extends": "nvfp4_train", "training": {"wgrad": "w4a16"}},
        'inline policy, [training] wgrad: precision = "w4a16" quantizes nothing. Under w4a16 only weights are 4-bit, and it has none.',
    ),
    "backward in inference": (
        {"extends": "nvfp4_train", "rule": [{"role": "wgrad", "graph": "inference", "precision": "high"}]},
        'inline policy, rule 1: graph = "inference" with a backward role. An inference graph has no backward. Drop one of the two.',
    ),
    "on one of the devices that auto knows": (
        {"extends": "auto", "rule": [{"match": "a", "hadamard": 16, "graph": "inference"}]},
        "inline policy (auto -> nvfp4_a16): inline policy, rule 1 (fprop): hadamard = 0 on the activation in high precision",
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_combination_is_refused_with_its_reason(case):
    document, said = ILLEGAL[case]
    with pytest.raises(IllegalCombination) as refused:
        load_policy({"version": 1, **document})
    assert str(refused.value).startswith(said)


LEGAL = {
    "2D weight": {"extends": "nvfp4", "default": {"weight": {"block": "16x16"}}},
    "stochastic activation in wgrad": {"extends": "nvfp4_train", "training": {"wgrad": {"activation": {"rounding": "stochastic"}}}},
    "four over six on a rotated activation of wgrad": {
        "extends": "nvfp4_train",
        "training": {"wgrad": {"activation": {"scale_rule": "four_over_six_mae"}}},
    },
    "rotation of a 1x16 dgrad": {"extends": "nvfp4_train", "training": {"dgrad": {"hadamard": 16, "weight": {"block": "1x16"}}}},
    "role named without [training]": {"extends": "nvfp4", "rule": [{"role": "wgrad", "precision": "w4a4", "hadamard": 16}]},
    "forward rotation of both": {"extends": "nvfp4", "rule": [{"match": "a", "hadamard": 128}]},
    "other format for a role": {"extends": "nvfp4_train", "rule": [{"role": "wgrad", "format": "mxfp4", "hadamard": 32}]},
    "attention in 4 bits": {"extends": "nvfp4", "rule": [{"role": "matmul", "trait": "attention", "precision": "w4a4"}]},
}


@pytest.mark.parametrize("case", LEGAL)
def test_what_is_sound_is_let_through(case):
    assert load_policy({"version": 1, **LEGAL[case]}).fingerprint()
