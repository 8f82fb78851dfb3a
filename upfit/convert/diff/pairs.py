"""Pure functions on one attention layer: queries in pairs, output projections to match.

Shapes as in `Attention`: H query heads, K key/value heads, D and V head widths, E hidden width. The two heads of a pair are
neighbours, 2i and 2i + 1, so that both lie in the group of one key/value head (Differential Transformer V2; pairs across groups
train worse).
"""

from dataclasses import replace

import torch
from torch import Tensor

from upfit.architecture.attention import Attention

HALF = 0.5  # λ where sigmoid's argument is 0; a power of two, so that nothing is rounded


def duplicate(attention: Attention, noise: float = 0.0, seed: int = 0) -> Attention:
    """Every query head twice, [H, D, E] → [2H, D, E]; queries, their biases and their norms if each head has its own.

    `noise` adds normal noise to the second of each pair, in units of the head's standard deviation.
    """
    assert attention.q is not None and attention.o is not None
    heads = attention.o.shape[1]
    q = _twice(attention.q, heads)
    if noise and q.device.type != "meta":
        generator = torch.Generator().manual_seed(seed)
        width = q[1::2].float().flatten(1).std(1)[:, None, None]
        drawn = torch.randn(q[1::2].shape, generator=generator) * width * noise
        q[1::2] = (q[1::2].float() + drawn).to(q.dtype)
    norm = attention.q_norm
    return replace(
        attention,
        q=q,
        q_bias=None if attention.q_bias is None else _twice(attention.q_bias, heads),
        q_norm=norm if norm is None or norm.ndim == 1 else _twice(norm, heads),
    )


def _twice(tensor: Tensor, heads: int) -> Tensor:
    """[H · n, ...] → [2H · n, ...], each head's n rows after one another twice."""
    return tensor.unflatten(0, (heads, -1)).repeat_interleave(2, 0).flatten(0, 1)


def scale_output(attention: Attention, factor: float) -> Attention:
    """Output columns [E, H, V] times `factor`; the bias is not a head's and stays."""
    assert attention.o is not None
    return replace(attention, o=attention.o * factor)


def spread_output(attention: Attention, lambdas: Tensor) -> Attention:
    """Output columns [E, H, V] → [E, 2H, V], those of head h and −λ_h times those: what the pair's difference times o is."""
    assert attention.o is not None
    o = attention.o.to(torch.promote_types(attention.o.dtype, torch.float32))
    minus = -lambdas.to(o)[None, :, None] * o
    return replace(attention, o=torch.stack([o, minus], 2).flatten(1, 2).to(attention.o.dtype))


def halve(attention: Attention, scale: Tensor) -> Attention:
    """Every query head as two, its rows times `scale` [H, 2, D]: q [H, D, E] → [2H, D, E], and its bias."""
    assert attention.q is not None
    bias = attention.q_bias
    return replace(
        attention,
        q=(attention.q[:, None] * scale[..., None].to(attention.q)).flatten(0, 1),
        q_bias=None if bias is None else (bias[:, None] * scale.to(bias)).flatten(0, 1),
    )


def fold_dex(attention: Attention, weight: Tensor, strength: Tensor) -> Attention:
    """Output columns that do what o does after head − strength_h · head · weight; weight [V, V], strength [H].

    DEX (arXiv 2505.16333) is linear in the head's output, so nothing of it is left to compute: a head's row vector x becomes
    x (1 − s W), and its columns o_h, as [V, E], become (1 − s W) o_h.
    """
    assert attention.o is not None
    o = attention.o.to(torch.promote_types(attention.o.dtype, torch.float32))
    turned = torch.einsum("vw,ehw->ehv", weight.to(o), o)
    return replace(attention, o=(o - strength.to(o)[None, :, None] * turned).to(attention.o.dtype))
