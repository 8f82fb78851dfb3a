"""Matrix products of float32 with rounded factors, where the hardware does those faster and what is made of them bears it.

The converted model's layers, products with a curvature and sums over many tokens bear it. What the teacher shows, what is
solved for, weights that are written and moments whose small differences count do not: products are exact unless a function says
`@rounded()` and runs inside `quick_products`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from upfit.architecture.loading import multiplies_bfloat16_fast

EXACT = "highest"
_precision = EXACT  # of products inside `rounded`


@contextmanager
def quick_products(device: torch.device, quick: bool = True) -> Iterator[None]:
    """Inside, what is `rounded` may round: factors to bfloat16 on a CPU with matrix units for it (relative errors of 2e-3), to
    TF32 on a GPU (5e-4); sums are of float32. Without `quick`, or on other hardware, all products stay exact."""
    global _precision
    before = _precision
    if quick and device.type == "cuda":
        _precision = "high"
    else:
        _precision = "medium" if quick and multiplies_bfloat16_fast(device) else EXACT
    try:
        yield
    finally:
        _precision = before


@contextmanager
def rounded() -> Iterator[None]:
    """Inside (or in a function with `@rounded()`), products of float32 may have rounded factors where `quick_products` says so.
    float64 is never touched."""
    before = torch.get_float32_matmul_precision()
    if _precision == EXACT:
        yield
        return
    torch.set_float32_matmul_precision(_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
