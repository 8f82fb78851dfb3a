"""Changes of a layer's weights that do not change its function. Aligned merging chooses among them.

Exact for layers without query/key norms whose values reach the output projection untouched. Shapes as in `Attention`: H query
heads, K key/value heads of H/K query heads each, D and V head widths, P rotated pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.attention import Attention


def expand_heads(attention: Attention, kv_heads: int) -> Attention:
    """Each key/value head repeated, so that there are `kv_heads`: what grouped-query attention does when it runs.

    A norm over all heads at once has the same mean square over repeated ones.
    """
    changed = {}
    for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
        tensor = getattr(attention, name)
        if tensor is not None and (name != "k_norm" or tensor.ndim > 1):  # a scale that all heads share stays
            changed[name] = tensor.repeat_interleave(kv_heads // tensor.shape[0], 0)
    return replace(attention, **changed)


def permute_heads(attention: Attention, order: Sequence[int]) -> Attention:
    """Key/value heads in another order, their query heads and columns of the output projection with them."""
    assert attention.k is not None and attention.o is not None
    size = attention.o.shape[1] // attention.k.shape[0]
    queries = [head * size + i for head in order for i in range(size)]
    changed: dict[str, Any] = {name: _taken(getattr(attention, name), order) for name in ("k", "v", "k_bias", "v_bias")}
    changed |= {name: _taken(getattr(attention, name), queries) for name in ("q", "q_bias", "gate", "gate_bias")}
    return replace(attention, **changed, o=attention.o[:, queries])


def _taken(tensor: Tensor | None, order: Sequence[int]) -> Tensor | None:
    return None if tensor is None else tensor[list(order)]


def scale_pairs(attention: Attention, factors: Tensor, first: Sequence[int], second: Sequence[int]) -> Attention:
    """Keys times complex `factors` [K, P] on the rotated pairs (first, second), queries divided by their conjugates.

    A turn of the plane where |factor| is 1. The rotation by position is a factor as well, so the two commute.
    """
    assert attention.q is not None
    group = attention.q.shape[0] // factors.shape[0]
    of_queries = (1 / factors.conj()).repeat_interleave(group, 0)
    changed: dict[str, Any] = {name: _times(getattr(attention, name), factors, first, second) for name in ("k", "k_bias")}
    changed |= {name: _times(getattr(attention, name), of_queries, first, second) for name in ("q", "q_bias")}
    return replace(attention, **changed)


def _times(tensor: Tensor | None, factors: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor | None:
    if tensor is None:
        return None
    shaped = factors.reshape(*factors.shape, *[1] * (tensor.ndim - 2))
    product = torch.complex(tensor[:, list(first)], tensor[:, list(second)]) * shaped
    changed = tensor.clone()
    changed[:, list(first)], changed[:, list(second)] = product.real, product.imag
    return changed


def rebase_values(attention: Attention, maps: Tensor) -> Attention:
    """Values of head j times the invertible `maps` [K, V, V][j], its query heads' output columns times the inverse."""
    assert attention.v is not None and attention.o is not None
    inverse = torch.linalg.inv(maps).repeat_interleave(attention.o.shape[1] // len(maps), 0)
    bias = None if attention.v_bias is None else torch.einsum("kvw,kw->kv", maps, attention.v_bias)
    return replace(attention, v=maps @ attention.v, v_bias=bias, o=torch.einsum("ehv,hvw->ehw", attention.o, inverse))
