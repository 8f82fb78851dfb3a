"""Contextual positions by the best implementation for where the tensors are.

This file ships inside converted folders, so it imports torch and its neighbours only.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cope_chunks import chunked, newest
from .cope_equations import Inputs, Sight


def attend(given: Inputs, sight: Sight) -> Tensor:
    """[B, T, H, V] by the best implementation for where the tensors are; under autocast q, k and v are in its type."""
    device = given.q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        given = replace(given, q=given.q.to(lower), k=given.k.to(lower), v=given.v.to(lower))
    if given.q.shape[2] == 1 and not torch.is_grad_enabled() and given.cap is None and given.sinks is None:
        return newest(given, sight)
    found = fused(given, sight) if given.q.is_cuda else None
    return chunked(given, sight) if found is None else found


def fused(given: Inputs, sight: Sight) -> Tensor | None:
    """[B, T, H, V] by the Triton kernels; None where they are not to be had or what queries see is not a stretch of keys."""
    kernels = _kernels()
    stretch = sight.stretches(given.q.shape[0], given.q.device) if kernels else None
    if kernels is None or stretch is None or not (given.gate_k is None or isinstance(given.gate_k, Tensor)):
        return None
    tensors = (given.q, given.k, given.v, given.gate_q, given.gate_k, given.gate_bias, given.sinks, given.z)
    return kernels.apply(*tensors, *stretch, given.scaling, given.cap)


@functools.cache
def _kernels() -> Any:
    try:
        from .cope_kernels import Fused
    except ImportError:  # no Triton here
        return None
    return Fused
