"""What was done and why, as data. Passes and backend write it along the way; the report reads it at the end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SiteDecision:
    """One row of the report. Sizes are text because a dynamic dimension is a symbol."""

    name: str
    role: str
    op: str
    m: str
    n: str
    k: str
    precision: str  # "nvfp4 W4A4", "nvfp4 W4A16", "bfloat16", ...
    rule: str
    reason: str
    operands: str = ""  # "nvfp4+h16 x nvfp4+sr+h16"; empty where both are plain
    kernel: str = ""  # which implementation runs it; empty where Inductor does
    bytes_before: int = 0  # of the weight in its own dtype; 0 without a weight
    bytes_after: int = 0  # of its codes, scales and global scale
    extra_k: int = 0  # channels of K that are quantized twice, so that the product is over k + extra_k
    fallback: bool = False  # True where the site could not follow the policy: given no 4 bits, or other values than the forward's


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """One pass over one graph: what it changed, notes for the reader, wall time in milliseconds."""

    name: str
    changed: int
    notes: tuple[str, ...]
    milliseconds: float


@dataclass(kw_only=True)
class GraphRecord:
    """Everything known about one compiled graph. `id` is torch's compile id, as in `0/0` (frame / recompilation)."""

    id: str
    training: bool
    target: str
    policy: str
    sites: list[SiteDecision] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    shared: int = 0  # quantize nodes removed because another one computes the same value
    freed_bytes: int = 0
    saved_bytes: int = 0  # what the forward keeps for the backward, parameters left out; at the sizes that were compiled for
    saved_code_bytes: int = 0  # of it codes, scales and global scales
    saved_bytes_without: int = 0  # the same if it kept in high precision what is kept as codes
    dump: str = ""  # folder of this graph's dump, if one was asked for
