"""One layer's latent attention as the tensors of the stock DeepSeek-V3 class, and back.

The latent's rows are scaled by a power of two s so small that the class's norm of it is a constant (`latent_scale.py`).

Shapes: H query heads, K key/value heads of the source, N unrotated and 2F rotated dimensions of a head, r latent width, V width
of a value head, E hidden width. Linear weights are [out, in]. Rotated rows are the first and then the second dimensions of all
pairs in our class, and first and second in turn in the stock class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upfit.architecture.latent_scale import EPS, FLOAT16, NORM, scale_of
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

Named = dict[str, "Tensor"]

QUERIES, LATENT, HEADS, OUTPUT = "q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight"


@dataclass(frozen=True)
class LatentShape:
    """The shape of every layer, and the factors between our class and the stock one.

    `scaling` is what our class multiplies scores with, `magnitude` that of the family's cosines and sines (yarn's attention
    factor; 1 otherwise), `branch` what the output projection is multiplied with, for a residual stream of another size.
    """

    heads: int
    kv_heads: int
    unrotated: int
    pairs: int
    latent: int
    v_head_dim: int
    scaling: float
    magnitude: float = 1.0
    branch: float = 1.0

    @property
    def width(self) -> int:
        """N + 2F, of a query."""
        return self.unrotated + 2 * self.pairs

    @property
    def queries(self) -> float:
        """What queries are multiplied with: the stock class divides scores by sqrt(N + 2F)."""
        return rounded_power(math.sqrt(self.width) * self.scaling)


def rounded_power(factor: float) -> float:
    """`factor`, or the power of two from which only the rounding of a square root keeps it."""
    power = 2.0 ** round(math.log2(factor)) if factor > 0 else factor
    return power if math.isclose(factor, power, rel_tol=1e-12) else factor


def to_stock(tensors: Mapping[str, "Tensor"], shape: LatentShape, scale: float) -> Named:
    """The five tensors of a stock attention.

    `tensors` has those of our class: `q_proj.weight` [H(N+2F), E], `kv_a_proj_with_mqa.weight` [r+2F, E], `kv_b_proj.weight`
    [K(N+V), r] and `o_proj.weight` [E, HV]. All keep their type; kv_b has the rows of H heads, and `kv_a_layernorm.weight` [r]
    is new. Each tensor is rounded at most once, and not at all where its factor is a power of two. Raises UpfitError for
    float16, in which numbers so small are zero.
    """
    import torch

    queries, latent = tensors[QUERIES].unflatten(0, (shape.heads, shape.width)), tensors[LATENT]
    if torch.float16 in (queries.dtype, latent.dtype):
        raise UpfitError(FLOAT16)
    order, split = in_turn(shape.pairs), [shape.unrotated, 2 * shape.pairs]
    plain, turned = queries.split(split, 1)
    plain, turned = plain * shape.queries, turned[:, order] * (shape.queries * shape.magnitude**2)
    compressed, keys = latent.split([shape.latent, 2 * shape.pairs])
    heads = tensors[HEADS].unflatten(0, (shape.kv_heads, -1)).repeat_interleave(shape.heads // shape.kv_heads, 0)
    return {
        QUERIES: torch.cat([plain, turned], 1).flatten(0, 1),
        LATENT: torch.cat([compressed * scale, keys[order]]),
        NORM: latent.new_full((shape.latent,), math.sqrt(EPS) / scale),
        HEADS: heads.flatten(0, 1),
        OUTPUT: tensors[OUTPUT] * shape.branch,
    }


def from_stock(tensors: Mapping[str, "Tensor"], shape: LatentShape) -> Named:
    """The inverse of `to_stock`: an ordinary latent, which can be trained. The scale is read from the norm's weight.

    `to_stock` with that scale (`scale_of`) gives the same tensors, bit for bit where the factors of `shape` are powers of two.
    Raises UpfitError where the norm is not such a constant, or heads that should share a source head differ.
    """
    import torch

    scale, order = scale_of(tensors[NORM]), in_turn(shape.pairs).argsort()
    queries = tensors[QUERIES].unflatten(0, (shape.heads, shape.width))
    plain, turned = queries.split([shape.unrotated, 2 * shape.pairs], 1)
    plain, turned = plain / shape.queries, turned[:, order] / (shape.queries * shape.magnitude**2)
    compressed, keys = tensors[LATENT].split([shape.latent, 2 * shape.pairs])
    groups = tensors[HEADS].unflatten(0, (shape.kv_heads, shape.heads // shape.kv_heads, -1))
    if not groups.is_meta and not torch.equal(groups, groups[:, :1].expand_as(groups)):
        raise UpfitError(f"the {shape.heads} heads of kv_b_proj are not {shape.kv_heads} repeated ones; take {shape.heads}")
    return {
        QUERIES: torch.cat([plain, turned], 1).flatten(0, 1),
        LATENT: torch.cat([compressed / scale, keys[order]]),
        HEADS: groups[:, 0].flatten(0, 1),
        OUTPUT: tensors[OUTPUT] / shape.branch,
    }


def in_turn(pairs: int) -> Any:
    """Indices [2F] that take rows (all first, all second) to (first, second) of one pair after the other."""
    import torch

    return torch.arange(2 * pairs).view(2, pairs).T.flatten()
