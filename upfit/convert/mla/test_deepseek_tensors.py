"""The scale of a latent: how small it is, and that taking it off and putting it on again changes no bit."""

import math

import pytest
import torch
from torch import Tensor

from upfit.architecture.latent_scale import EPS, latent_scale, mean_square_bound, scale_of
from upfit.convert.mla.deepseek_tensors import (
    LatentShape,
    from_stock,
    to_stock,
)
from upfit.errors import UpfitError

EVEN = LatentShape(heads=4, kv_heads=2, unrotated=4, pairs=2, latent=6, v_head_dim=5, scaling=0.5 / math.sqrt(8), branch=0.25)
UNEVEN = LatentShape(4, 2, 4, 2, 6, 5, scaling=0.3, magnitude=1.1, branch=0.3)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def attention(shape: LatentShape, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows = {
        "q_proj.weight": (shape.heads * shape.width, 12),
        "kv_a_proj_with_mqa.weight": (shape.latent + 2 * shape.pairs, 12),
        "kv_b_proj.weight": (shape.kv_heads * (shape.unrotated + shape.v_head_dim), shape.latent),
        "o_proj.weight": (12, shape.heads * shape.v_head_dim),
    }
    return {name: torch.randn(size, dtype=dtype) for name, size in rows.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_taken_off_and_put_on_again(dtype: torch.dtype) -> None:
    own, scale = attention(EVEN, dtype), 2.0**-24
    stock = to_stock(own, EVEN, scale)
    assert {tensor.dtype for tensor in stock.values()} == {dtype}
    assert not torch.equal(stock["q_proj.weight"], own["q_proj.weight"])
    assert scale_of(stock["kv_a_layernorm.weight"]) == scale
    assert equal(from_stock(stock, EVEN), own)
    assert equal(to_stock(from_stock(stock, EVEN), EVEN, scale), stock)


def test_other_factors_are_rounded_once() -> None:
    own = attention(UNEVEN, torch.float32)
    again = from_stock(to_stock(own, UNEVEN, 2.0**-20), UNEVEN)
    for name, tensor in own.items():
        torch.testing.assert_close(again[name], tensor, rtol=2e-7, atol=0)
    latent = slice(0, UNEVEN.latent)
    assert torch.equal(again["kv_a_proj_with_mqa.weight"][latent], own["kv_a_proj_with_mqa.weight"][latent])


@pytest.mark.parametrize("mean_square", [1e-6, 0.7, 1.0, 3e5])
@pytest.mark.parametrize("error", [1e-7, 1e-12])
def test_the_scale_is_the_largest_power_that_the_error_allows(mean_square: float, error: float) -> None:
    scale = latent_scale(mean_square, error)
    assert math.log2(scale).is_integer()
    assert scale**2 * mean_square / (2 * EPS) <= error < (2 * scale) ** 2 * mean_square / (2 * EPS)
    assert latent_scale(0.0) == 1.0


def test_no_text_exceeds_the_bound() -> None:
    """Behind an RMSNorm, for ordinary inputs and the worst one."""
    torch.manual_seed(0)
    latent, norm = torch.randn(6, 12), torch.rand(12)
    inputs = torch.cat([100 * torch.randn(500, 12), torch.linalg.svd(latent * norm).Vh[:1], torch.eye(12)])
    normed = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True)) * norm
    squares = (normed @ latent.T).square().mean(-1)
    assert squares.max() <= mean_square_bound(latent, norm) < 10 * squares.max()


def test_a_norm_that_does_something_is_refused() -> None:
    stock = to_stock(attention(EVEN, torch.float32), EVEN, 2.0**-20)
    learned = stock["kv_a_layernorm.weight"].clone()
    learned[0] *= 2
    for norm in (learned, torch.ones(6), torch.zeros(6)):
        with pytest.raises(UpfitError, match="no constant of a scaled latent"):
            from_stock(stock | {"kv_a_layernorm.weight": norm}, EVEN)
    changed = stock["kv_b_proj.weight"].clone()
    changed[0] += 1
    with pytest.raises(UpfitError, match="not 2 repeated ones; take 4"):
        from_stock(stock | {"kv_b_proj.weight": changed}, EVEN)
