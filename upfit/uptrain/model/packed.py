"""Attention over documents packed in rows, without a mask: each document is attended to by itself.

A mask that separates documents takes length² a row, and the masked scores are computed all the same. Here the documents of a
batch are found where positions do not continue, and each is computed alone: on CUDA (bfloat16, float16) by FlashAttention
for sequences of various lengths, elsewhere by causal SDPA of one document after the other. Soft caps and dropout, which torch's
does not know, are left to the package flash-attn where it is installed.

transformers calls it as an attention implementation, with the arguments of a layer. It refuses what it cannot compute (sinks,
attention in two directions). Whether it works for a class at all is found by trying (`model_traits.pack`).

Legend: B rows, T tokens a row, H query heads, K key/value heads, D head size, N documents.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface

NAME = "upfit_packed"
SHORT = 32  # tokens; of documents shorter than that on average, one masked product is faster than many small ones
REPEATS = "enable_gqa" not in inspect.signature(varlen_attn).parameters  # torch 2.11 wants as many key heads as query heads

# What is known of a batch, by its positions, for as long as that tensor is there.
_DOCUMENTS, _MASKS = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Documents:
    """Of a batch, its rows laid end to end: `bounds` [N + 1] int32 on the device, the same on the host, and the longest."""

    bounds: Tensor
    ends: list[int]
    longest: int


def documents(positions: Tensor) -> Documents:
    """Where documents begin in `positions` [B, T]: at the start of a row, and where a position is not the one before plus 1.

    Kept as long as the tensor, which all layers are given: one synchronisation with the device a batch.
    """
    known: Documents | None = _DOCUMENTS.get(positions)
    if known is None:
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        bounds = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=positions.numel()).to(torch.int32)
        ends = bounds.tolist()
        known = Documents(bounds, ends, max(end - start for start, end in zip(ends, ends[1:], strict=False)))
        _DOCUMENTS[positions] = known
    return known


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`query` [B, H, T, D], `key` and `value` [B, K, T, D] → [B, T, H, D]. Raises NotImplementedError for what it cannot do."""
    if position_ids is None or position_ids.shape != query.shape[::2][:2] or key.shape[2] != query.shape[2]:
        raise NotImplementedError("documents are found by the positions of all keys")
    on_cuda = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    more = {"dropout_p": dropout, "softcap": softcap or 0.0}
    beyond_torch = any(more.values())
    flash = _flash_attn() if on_cuda and beyond_torch else None
    known = getattr(module, "is_causal", True) and others.get("is_causal") is not False
    known = known and not any(others.get(name) is not None for name in UNKNOWN)
    if attention_mask is not None or not known or (beyond_torch and flash is None):
        raise NotImplementedError("this attention is more than causal")
    packed = documents(position_ids)
    window = sliding_window if sliding_window and sliding_window < packed.longest else None
    if flash is not None:
        return _flash(flash, query, key, value, packed, scaling, window, more), None
    if on_cuda:
        return _varlen(query, key, value, packed, scaling, window), None
    return _one_by_one(query, key, value, packed, scaling, window, position_ids), None


UNKNOWN = ("s_aux", "sinks", "position_bias", "cache")


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Documents, scaling: float | None, window: int | None) -> Tensor:
    rows, heads, length, _ = q.shape
    more: dict[str, Any] = {}
    if k.shape[1] != heads:
        if REPEATS:
            k, v = (tensor.repeat_interleave(heads // k.shape[1], 1) for tensor in (k, v))
        else:
            more["enable_gqa"] = True
    q, k, v = map(_end_to_end, (q, k, v))
    bounds, longest, sides = packed.bounds, packed.longest, _sides(window)
    output = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=sides, **more)
    assert isinstance(output, Tensor), "nothing else was asked for"
    return output.view(rows, length, heads, -1)


def _flash(
    attention: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Documents,
    scaling: float | None,
    window: int | None,
    more: dict[str, Any],
) -> Tensor:
    rows, heads, length, _ = q.shape
    bounds, longest = packed.bounds, packed.longest
    settings: dict[str, Any] = {"softmax_scale": scaling, "causal": True, "window_size": _sides(window), **more}
    output = attention(*map(_end_to_end, (q, k, v)), bounds, bounds, longest, longest, **settings)
    return output.view(rows, length, heads, -1)


@functools.cache
def _flash_attn() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _end_to_end(tensor: Tensor) -> Tensor:
    """[B, H, T, D] → [B · T, H, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _sides(window: int | None) -> tuple[int, int]:
    """How many keys before a query and after it are looked at; -1: all."""
    return (-1 if window is None else window - 1, 0)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, packed: Documents, scaling: float | None, window: int | None, positions: Tensor
) -> Tensor:
    rows, heads, length, _ = q.shape
    more: dict[str, Any] = {"scale": scaling, "enable_gqa": k.shape[1] != heads}
    if len(packed.ends) - 1 == rows and window is None:  # each row is one
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **more).transpose(1, 2)
    if len(packed.ends) - 1 > 2 * rows + rows * length / SHORT:
        mask = _mask(positions, window)
        return F.scaled_dot_product_attention(q, k, v, mask, **more).transpose(1, 2)
    outputs = []
    for start, end in zip(packed.ends, packed.ends[1:], strict=False):
        row, first = divmod(start, length)
        queries, keys, values = (tensor[row : row + 1, :, first : first + end - start] for tensor in (q, k, v))
        tokens = torch.arange(end - start, device=q.device)
        near = None if window is None or end - start <= window else _near(tokens[:, None] - tokens, window)
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, near, is_causal=near is None, **more))
    return torch.cat(outputs, 2).transpose(1, 2).reshape(rows, length, heads, -1)


def _mask(positions: Tensor, window: int | None) -> Tensor:
    """[B, 1, T, T]: what a query may look at, kept as long as `positions`."""
    masks = _MASKS.setdefault(positions, {})
    mask: Tensor | None = masks.get(window)
    if mask is None:
        starts = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0)).cumsum(1)
        tokens = torch.arange(positions.shape[1], device=positions.device)
        near = _near(tokens[:, None] - tokens, window or len(tokens))
        mask = ((starts[:, :, None] == starts[:, None, :]) & near)[:, None]
        masks[window] = mask
    return mask


def _near(distance: Tensor, window: int) -> Tensor:
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, packed_attention)
