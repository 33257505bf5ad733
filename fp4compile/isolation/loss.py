"""What is compared: the loss of a model's outputs, and how far its predictions are from those in high precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.isolation.planned import Batch

Loss = Callable[[Any, Batch], Tensor]
IGNORED: Final = -100  # label of a token without loss, as in transformers


class NoLoss(Fp4CompileError, ValueError):
    template = (
        "sensitivity: the next-token loss needs {needed}; batch {batch} gave {found}. "
        "Give loss = a function of (outputs, batch) that returns a scalar tensor, the mean loss."
    )


class NotFinite(Fp4CompileError, ValueError):
    template = (
        "sensitivity: the {what} of {where} is {found} on batch {batch}, so nothing can be compared with it. "
        "Look for NaN or Inf in the inputs, or for a batch in which every label is ignored."
    )


def next_token_loss(outputs: Any, batch: Batch) -> Tensor:
    """Mean cross entropy of each token after those before it, nats, float32. Labels are `labels` or the batch's own tokens."""
    logits, labels = logits_of(outputs), labels_of(batch)
    if logits is None or labels is None or logits.shape[:-1] != labels.shape:
        needed = "logits (..., length, vocabulary) and integer tokens (..., length)"
        raise NoLoss(needed=needed, batch=_described(batch), found=_described(outputs))
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), labels[..., 1:].flatten(), ignore_index=IGNORED)


def logits_of(outputs: Any) -> Tensor | None:
    """The `logits` of a model's outputs, or the outputs themselves, where they are a tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, tuple) and outputs:
        found = outputs[0]
    return found if isinstance(found, Tensor) else None


def labels_of(batch: Batch) -> Tensor | None:
    if isinstance(batch, Mapping):
        found = batch.get("labels", batch.get("input_ids"))
        return found if isinstance(found, Tensor) else None
    candidates = batch if isinstance(batch, tuple) else (batch,)
    return next((x for x in candidates if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)), None)


def divergence(base: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(base || logits) over positions, nats; `base` (..., vocabulary) are log-probabilities."""
    log_p = logits.float().log_softmax(-1)
    return F.kl_div(log_p.flatten(0, -2), base.flatten(0, -2), reduction="batchmean", log_target=True)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_described(item)}" for name, item in value.items()) + "}"
    return type(value).__name__
