"""`mode="max-autotune"`: the products of a graph search their tiles before it runs for the first time.

Outside of the trace, in which every tensor would be a fake one. What is found is kept by `codegen.tuning`, where launches look.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from fp4compile.codegen.registry import search_tiles
from fp4compile.codegen.target import Target
from fp4compile.passes.products import ProductShape

_log = logging.getLogger(__name__)


def wants_search(mode: str) -> bool:
    return mode.startswith("max-autotune")


@torch.no_grad()
def search_products(products: Sequence[ProductShape], target: Target, device: torch.device) -> int:
    """Search for each of `products` whose kernels have tiles to choose from. Returns how many those were."""
    searched = 0
    for product in tqdm(products, desc="tiles", unit="product", disable=None):  # shown on a terminal only
        start = time.perf_counter()
        if search_tiles(product.spec, target, product.m, product.n, product.k, device):
            searched += 1
            _log.info("searched tiles for %s in %.1f s", product, time.perf_counter() - start)
    return searched
