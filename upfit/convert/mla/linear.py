"""Queries and keys as linear maps of the inputs, where norms stand behind their projections.

A latent holds no key of each head, so no norm of one: keys k = γ · h / rms(h), h = W x, are replaced by the linear map that is
nearest on the text, each row of W times a number. What this costs the fit of scores makes good, as far as it can.
"""

import torch
from torch import Tensor

from upfit.architecture.attention import Attention
from upfit.calibration.observe import Seen
from upfit.calibration.ridge import augmented
from upfit.calibration.rotation import Turns
from upfit.calibration.teacher_view import View
from upfit.calibration.traits import AttentionTraits
from upfit.convert.mla.sums import still


def with_bias(weight: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """`weight` [heads, D, E] with its bias, or zeros, as one more column where `width` is E + 1."""
    if weight.shape[-1] == width:
        return weight
    column = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
    return torch.cat([weight, column[..., None]], -1)


def projections(attention: Attention, order: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [H, D, E'] and keys [K, D, E'] with their dimensions in `order`, values [K, V, E']; E' is E + 1 where one of them
    has a bias."""
    assert attention.q is not None and attention.k is not None and attention.v is not None
    biases = (attention.q_bias, attention.k_bias, attention.v_bias)
    width = attention.q.shape[-1] + any(bias is not None for bias in biases)
    q, k, v = (
        with_bias(weight, bias, width) for weight, bias in zip((attention.q, attention.k, attention.v), biases, strict=True)
    )
    return q[:, order], k[:, order], v


def scale_sums(view: View, seen: Seen, traits: AttentionTraits, turns: Turns, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Of one batch: what linear queries and keys, by `q` [H, D, E'] and `k` [K, D, E'], have with those that the attention is
    given, and their own energies: `scale_q` [2, H, D] and `scale_k` [2, K, D], float64."""
    sums, inputs = {}, augmented(view.inputs, q.shape[-1])
    for name, weight, heads, turn in (("scale_q", q, seen.q, turns.q), ("scale_k", k, seen.k, turns.k)):
        actual = still(heads[..., list(traits.order)].transpose(1, 2), turn)
        linear = torch.einsum("bte,hde->bthd", inputs, weight.to(inputs))
        parts = torch.stack([(linear * actual).sum((0, 1)), linear.square().sum((0, 1))])
        sums[name] = parts.double().cpu()
    return sums


def scaled(weight: Tensor, sums: Tensor) -> Tensor:
    """`weight` [heads, D, E'] with each row times the number that the `sums` [2, heads, D] of `scale_sums` say."""
    return weight * (sums[0] / sums[1].clamp_min(1e-30))[..., None]
