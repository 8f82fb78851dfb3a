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


def attend(inputs: Inputs, sight: Sight) -> Tensor:
    """[B, T, H, V] by the best implementation for where the tensors are; under autocast q, k and v are in its type."""
    device = inputs.q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        inputs = replace(inputs, q=inputs.q.to(lower), k=inputs.k.to(lower), v=inputs.v.to(lower))
    if inputs.q.shape[2] == 1 and not torch.is_grad_enabled() and inputs.cap is None and inputs.sinks is None:
        return newest(inputs, sight)
    output = fused(inputs, sight) if inputs.q.is_cuda else None
    return chunked(inputs, sight) if output is None else output


def fused(inputs: Inputs, sight: Sight) -> Tensor | None:
    """[B, T, H, V] by the Triton kernels; None where they are not to be had or what queries see is not a stretch of keys."""
    kernels = _kernels()
    stretch = sight.stretches(inputs.q.shape[0], inputs.q.device) if kernels else None
    if kernels is None or stretch is None or not (inputs.gate_k is None or isinstance(inputs.gate_k, Tensor)):
        return None
    tensors = (inputs.q, inputs.k, inputs.v, inputs.gate_q, inputs.gate_k, inputs.gate_bias, inputs.sinks, inputs.z)
    return kernels.apply(*tensors, *stretch, inputs.scaling, inputs.cap)


@functools.cache
def _kernels() -> Any:
    try:
        from .cope_kernels import Fused
    except ImportError:  # no Triton here
        return None
    return Fused
