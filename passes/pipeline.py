"""The order of the passes, in one place, and the loop that runs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, Protocol

from torch import fx

from fp4compile.passes.add_residuals import AddResiduals
from fp4compile.passes.assign_precision import AssignPrecision
from fp4compile.passes.base import Pass, PassContext
from fp4compile.passes.cleanup import Cleanup
from fp4compile.passes.dequantize_backward import DequantizeBackward
from fp4compile.passes.find_matmuls import FindMatmuls
from fp4compile.passes.fold_weights import FoldWeights
from fp4compile.passes.fuse_prologue import FusePrologue
from fp4compile.passes.insert_hadamard import InsertHadamard
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.lower_convolutions import LowerConvolutions
from fp4compile.passes.normalize import Normalize
from fp4compile.passes.pair_axes import PairAxes
from fp4compile.passes.record import PassRecord
from fp4compile.passes.requantize_forward import RequantizeForward
from fp4compile.passes.select_kernels import SelectKernels
from fp4compile.passes.share_quantize import ShareQuantize
from fp4compile.passes.verify import verify

ANALYSIS: Final[tuple[Pass, ...]] = (
    Normalize(),
    FindMatmuls(),
    AssignPrecision(),
)
PIPELINE: Final[tuple[Pass, ...]] = (
    *ANALYSIS,
    LowerConvolutions(),  # before rotating: from here on every planned site is a product of two matrices
    RequantizeForward(),  # before rotating: what is rotated is what the forward multiplied with
    InsertHadamard(),  # before quantizing: what is quantized is the rotated value
    InsertQuantize(),
    AddResiduals(),  # before sharing: each quantize node still belongs to one product
    ShareQuantize(),  # before fusing, so that two readers of one rotation still are one node
    DequantizeBackward(),  # before fusing, which hides whether a forward is rotated
    FusePrologue(),
    FoldWeights(),  # after fusing: a folded weight is computed by its final quantize node
    SelectKernels(),
    PairAxes(),  # after the layouts are chosen, each by the readers of one half
    Cleanup(),
)


class Instrument(Protocol):
    """Watches a run: dumps, traces. Passes know nothing of it."""

    def after_pass(self, index: int, record: PassRecord, gm: fx.GraphModule) -> None: ...


def run(
    gm: fx.GraphModule,
    ctx: PassContext,
    passes: Sequence[Pass] = PIPELINE,
    *,
    instruments: Sequence[Instrument] = (),
    check: bool = False,
) -> None:
    """Run `passes` over `gm` in place and write a PassRecord for each. `check` verifies the graph's invariants in between."""
    for index, each in enumerate(passes, start=1):
        start = time.perf_counter()
        result = each.run(gm, ctx)
        elapsed = 1e3 * (time.perf_counter() - start)
        record = PassRecord(name=each.name, changed=result.changed, notes=result.notes, milliseconds=elapsed)
        ctx.record.passes.append(record)
        if check:
            verify(gm, each.name)
        for instrument in instruments:
            instrument.after_pass(index, record, gm)
