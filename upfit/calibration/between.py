"""What lies between an attention and its output projection: nothing, a gate of each head or dimension, a norm of all heads.

It is found by running the layer with an attention that gives out ones: a gate does not look at what it multiplies.
"""

import torch
from torch import Tensor, nn

from upfit.calibration.observe import Call, Seen, listening, run_block, tapped
from upfit.calibration.residual import CLOSE, FEW, unexplained
from upfit.calibration.watch import Place, Watched

PLAIN, OF_HEADS, OF_DIMENSIONS, OTHER = "", "heads", "dimensions", "other"


def gates_of(watched: Watched, place: Place) -> Tensor:
    """[B, T, H, V]: what each number that the attention gives out is multiplied with before the output projection sees it."""
    attended = watched.seen.output
    projected = watched.taps[place.path("o")][0].reshape(attended.shape)
    return torch.where(attended == 0, 0, projected / attended)


def find_gates(place: Place, hidden: Tensor, call: Call, watched: Watched) -> str:
    """PLAIN; OF_HEADS where each head is multiplied with a number at every position; OF_DIMENSIONS where each dimension of it
    is, or where a norm divides all heads of a position by one number. OTHER where it is something else."""
    attended, projected = watched.seen.output[:FEW], watched.taps[place.path("o")][0][:FEW]
    if attended.numel() != projected.numel():
        return OTHER
    projected = projected.reshape(attended.shape)
    if unexplained(projected, attended) < CLOSE:
        return PLAIN
    gates = _of_ones(place, hidden, call)
    if gates is None or gates.numel() < projected.numel():
        return OTHER
    gates = gates[:FEW].reshape(attended.shape)
    product = gates * attended
    if unexplained(projected, product) < CLOSE:
        return OF_HEADS if unexplained(gates, gates[..., :1].expand_as(gates)) < CLOSE else OF_DIMENSIONS
    flat, other = product.flatten(2), projected.flatten(2)
    lengths = (flat * other).sum(-1, keepdim=True) / flat.square().sum(-1, keepdim=True).clamp_min(1e-30)  # no division by 0
    return OF_DIMENSIONS if unexplained(other, lengths * flat) < CLOSE else OTHER


def _of_ones(place: Place, hidden: Tensor, call: Call) -> Tensor | None:
    """What the output projection sees where the attention gives out ones; None where that does not go through transformers'
    interface."""
    module, calls = place.block.module, list[nn.Module]()
    own, path = module.get_submodule(place.at), place.path("o")

    def ones(seen: Seen) -> Tensor | None:
        if seen.module is not own:
            return None
        calls.append(own)
        return torch.ones_like(seen.output)

    with listening(ones), tapped({path: module.get_submodule(path)}) as taps:
        run_block(module, hidden, call)
    return taps[path][0] if calls else None
