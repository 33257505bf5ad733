"""What the passes add to compile time: their share of one cold compilation, and how they grow with the graph.

    python tests/perf/compile_time.py [--layers 30] [--training]

No result is cached between runs. The growth table runs the passes alone, over chains of linear layers.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fp4compile
from fp4compile import capture, handoff
from fp4compile.codegen.target import target_of
from fp4compile.passes.base import PassContext
from fp4compile.passes.pipeline import run
from fp4compile.passes.record import GraphRecord
from fp4compile.policy.load import load_policy


def smollm2(layers: int) -> nn.Module:
    """SmolLM2-135M's shapes with random weights."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **sizes)).to(torch.bfloat16)


def seconds_to_first_result(model: nn.Module, training: bool, backend: str, **kwargs: Any) -> float:
    torch._dynamo.reset()
    ids = torch.randint(0, 49152, (1, 64))
    with torch.compiler.config.patch(force_disable_caches=True), torch.set_grad_enabled(training):
        start = time.perf_counter()
        out = torch.compile(model, backend=backend, **kwargs)(ids, use_cache=False)
        if training:
            out.logits.float().mean().backward()
        return time.perf_counter() - start


def growth(matmuls: int, policy: str) -> tuple[int, float]:
    """(sites, seconds in all passes) for a chain of `matmuls` forward matmuls; a training policy triples the sites."""
    record = GraphRecord(id="-", training=False, target="cpu", policy=policy)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names, target = capture.parameter_names(gm, inputs), target_of(torch.device("cpu"))
        training = policy.endswith("train")
        loaded = load_policy(policy).resolve_for(target, training=training)
        decide = lambda sites: loaded.decide(sites, training=training)  # noqa: E731

        def transform(joint: fx.GraphModule) -> None:
            capture.mark_inputs(joint.graph)
            run(joint, PassContext(decide=decide, target=target, record=record, parameters=names))

        return handoff.trace_only(gm, inputs, transform=transform, fingerprint="growth")

    torch._dynamo.reset()
    model = nn.Sequential(*(layer for _ in range(matmuls) for layer in (nn.Linear(16, 16), nn.ReLU())))
    with torch.set_grad_enabled(policy.endswith("train")):
        torch.compile(model, backend=backend)(torch.randn(4, 16))
    return len(record.sites), sum(p.milliseconds for p in record.passes) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--training", action="store_true")
    args = parser.parse_args()
    model, policy = smollm2(args.layers), "nvfp4_train" if args.training else "nvfp4"
    inductor = seconds_to_first_result(model, args.training, "inductor")
    ours = seconds_to_first_result(model, args.training, "fp4", options={"policy": policy})
    (graph,) = fp4compile.last_report().graphs
    passes = sum(p.milliseconds for p in graph.passes) / 1e3
    rows = [("inductor, first result", inductor), ("fp4, first result", ours), ("of it our passes", passes)]
    print(tabulate([(name, f"{s:.2f}", f"{s / inductor:.1%}") for name, s in rows], headers=["", "seconds", "of inductor's"]))
    table = [("nvfp4", n, *growth(n, "nvfp4")) for n in (500, 1000, 2000)] + [
        ("nvfp4_train", n, *growth(n, "nvfp4_train")) for n in (170, 340, 680)
    ]
    rows = [(p, n, sites, f"{s:.2f}", f"{1e3 * s / sites:.2f}") for p, n, sites, s in table]
    print(tabulate(rows, headers=["policy", "layers", "matmuls", "seconds in passes", "ms a matmul"]))


if __name__ == "__main__":
    main()
