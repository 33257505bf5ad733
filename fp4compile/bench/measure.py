"""One case to one row: verified first, then timed in turns with its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fp4compile.bench.case import MatmulCase, QuantizeCase
from fp4compile.bench.floor import Speeds, matmul_floor, quantize_floor
from fp4compile.bench.ours import Product, activation, dense_weight, dense_weights, quantize_call, seed_on
from fp4compile.bench.peers import PEERS, Peer, describe, failures, noting_failure
from fp4compile.bench.results import OURS, Row
from fp4compile.bench.verify import Verdict, verify_product
from fp4compile.bench.verify_quantize import verify_quantize
from fp4compile.codegen.formats import FORMATS
from fp4compile.codegen.target import target_of
from fp4compile.codegen.timing import Call, Effort, Timed, copies_for, in_turns, prepare

Probe = Callable[[Peer, MatmulCase], str]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how carefully to measure, and against whom. `probe` says why a peer cannot run a case, or nothing."""

    device: torch.device
    effort: Effort
    speeds: Speeds
    peers: Sequence[str]
    probe: Probe

    @torch.no_grad()
    def matmul(self, case: MatmulCase) -> Row:
        target = target_of(self.device, where="bench")
        product = Product.of(case, target, self.device)
        x = activation(case.m, case.k, self.device)
        row = partial(Row, kind=case.kind, key=case.key, case=case.as_json(), notes={"kernel": product.kernel})
        verdict = _checked(lambda: verify_product(product, x, dense_weights(case, self.device, 0)))
        if verdict.wrong:
            return row(wrong=verdict.wrong, errors=verdict.errors)
        contenders: dict[str, Timed] = {}
        failed: dict[str, str] = {}
        with noting_failure(OURS, failed):
            contenders[OURS] = prepare(self._our_calls(product, x), self.device, self.effort)
        for name in self.peers:
            if reason := self.probe(PEERS[name], case):
                failed[name] = reason
                continue
            with noting_failure(name, failed):
                contenders[name] = prepare(PEERS[name].calls(case, x), self.device, self.effort)
        floor, floor_by = matmul_floor(case, self.speeds, target)
        times = in_turns(contenders, self.effort)
        return row(errors=verdict.errors, times=times, failed=failed, floor=floor, floor_by=floor_by)

    def _our_calls(self, product: Product, x: torch.Tensor) -> list[Call]:
        case = product.case
        copies = copies_for(int(case.values * FORMATS[case.format].bits_per_value / 8), self.device)
        weights = [product.weight(dense_weights(case, self.device, i)) for i in range(copies)]
        return [partial(product.call, x, weight) for weight in weights]

    @torch.no_grad()
    def quantize(self, case: QuantizeCase) -> Row:
        row = partial(Row, kind=case.kind, key=case.key, case=case.as_json())
        verdict = _checked(lambda: verify_quantize(case, self.device))
        if verdict.wrong:
            return row(wrong=verdict.wrong)
        copies = copies_for(2 * case.rows * case.columns, self.device)
        tensors = [dense_weight(case.rows, case.columns, self.device, i) for i in range(copies)]
        seed = seed_on(self.device)
        contenders: dict[str, Timed] = {}
        failed: dict[str, str] = {}
        with noting_failure(OURS, failed):
            contenders[OURS] = prepare([quantize_call(case, x, seed) for x in tensors], self.device, self.effort)
        contenders["copy"] = prepare([x.clone for x in tensors], self.device, self.effort)
        floor, floor_by = quantize_floor(case, self.speeds)
        return row(times=in_turns(contenders, self.effort), failed=failed, floor=floor, floor_by=floor_by)


def _checked(verify: Callable[[], Verdict]) -> Verdict:
    """An operator that raises is as wrong as one that gives other numbers."""
    try:
        return verify()
    except failures() as failure:
        return Verdict(wrong=describe(failure), errors={})
