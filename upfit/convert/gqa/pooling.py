"""Merging the key/value heads of a group, as in the GQA paper (arXiv 2305.13245, section 2.1 and figure 4).

Pure functions on tensors whose first dimension counts key/value heads. Groups are contiguous, the order in which
transformers repeats a head for its queries. Arithmetic is in float32 (float64 for float64), the result has the input's type.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from upfit.architecture.attention import Attention

if TYPE_CHECKING:
    from torch import Tensor


def pool_heads(attention: Attention, kv_heads: int, method: str, seed: int, initializer_range: float) -> Attention:
    """The layer with `kv_heads` key/value heads. k [K, D, E] → [kv_heads, D, E], and so on for v, biases and per-head norms.

    `method`: "mean" of the group, its "first" head, or "random" (projections drawn from a normal distribution of width
    `initializer_range`, biases zero, norm scales averaged).
    """
    generator = torch.Generator().manual_seed(seed)
    changed: dict[str, Any] = {}
    for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
        tensor = getattr(attention, name)
        if tensor is None or (name == "k_norm" and tensor.ndim == 1):  # a scale that all heads share stays
            continue
        if method == "random" and name != "k_norm":
            changed[name] = _draw(tensor, kv_heads, generator, 0.0 if name.endswith("bias") else initializer_range)
        else:
            changed[name] = first(tensor, kv_heads) if method == "first" else mean(tensor, kv_heads)
    return replace(attention, **changed)


def groups(heads: "Tensor", kv_heads: int) -> "Tensor":
    """[K, ...] → [kv_heads, K / kv_heads, ...], contiguous groups."""
    return heads.unflatten(0, (kv_heads, -1))


def mean(heads: "Tensor", kv_heads: int) -> "Tensor":
    """[K, ...] → [kv_heads, ...], the mean of each group; only one group at a time is there in float32 (or wider)."""
    wide = torch.promote_types(heads.dtype, torch.float32)
    return torch.stack([group.to(wide).mean(0).to(heads.dtype) for group in groups(heads, kv_heads)])


def first(heads: "Tensor", kv_heads: int) -> "Tensor":
    """[K, ...] → [kv_heads, ...], the first head of each group."""
    return groups(heads, kv_heads)[:, 0]


def _draw(like: "Tensor", kv_heads: int, generator: torch.Generator, width: float) -> "Tensor":
    shape = (kv_heads, *like.shape[1:])
    if like.device.type == "meta":
        return like.new_empty(shape)
    return (torch.randn(shape, generator=generator) * width).to(like.dtype)
