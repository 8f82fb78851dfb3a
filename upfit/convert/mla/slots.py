"""Rotated keys that all heads share: a reduction of rank over the key/value heads, for each rotated pair of dimensions.

A pair of dimensions is read as one complex number, which the rotation by position multiplies with e^{iωt}. So a complex factor
commutes with the rotation: shared keys are complex mixtures of the heads' keys, and queries take up the factors.

Shapes: H query heads, K key/value heads, P rotated pairs (fastest first), S slots. All complex128 or float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALTERNATIONS = 10  # each lowers the error; after so many it hardly moves
RIDGE = 1e-9  # of the mean energy, where a moment is not of full rank


@dataclass(frozen=True)
class Slots:
    """Shared rotated keys: of each its pair, `mix` [S, K] of the heads' keys, and `factors` [S, H] so that a query head's own
    key on pair f is about Σ over the slots of f of factor · mix · keys."""

    pairs: tuple[int, ...]
    mix: Tensor
    factors: Tensor


def share_pairs(moments: Tensor, energy: Tensor, owners: Tensor, counts: Sequence[int]) -> Slots:
    """`counts` [P] shared keys for each pair, those that minimise Σ_h energy_h · E|k_own − Σ_s u_h,s k_s|².

    `moments` [H, P, K, K]: E[k kᴴ] of the heads' keys under each query head's attention, centred; `energy` [H, P] of the
    queries; `owners` [H]: the key/value head of a query head. One key on a pair: alternating least squares from the leading
    eigenvector; more: the leading eigenvectors, least squares for the factors; as many as heads: the heads themselves, exactly.
    """
    pairs, mixes, factors = list[int](), list[Tensor](), list[Tensor]()
    for pair, count in enumerate(counts):
        if not count:
            continue
        if count == moments.shape[-1]:
            mix = torch.eye(count, dtype=moments.dtype)
            of_heads = mix[owners]
        else:
            mix, of_heads = _shared(moments[:, pair] * energy[:, pair, None, None], owners, count)
        pairs += [pair] * count
        mixes.append(mix)
        factors.append(of_heads.T)
    kv_heads, heads = moments.shape[-1], len(owners)
    if not pairs:
        return Slots((), moments.new_empty(0, kv_heads), moments.new_empty(0, heads))
    return Slots(tuple(pairs), torch.cat(mixes), torch.cat(factors))


def _shared(weighted: Tensor, owners: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mixtures [count, K] and factors [H, count] for one pair, `weighted` [H, K, K] being its moments times the energies."""
    mean, heads = weighted.sum(0), torch.arange(len(owners))
    size = mean.diagonal().real.mean().clamp_min(1e-30)  # no division by 0
    mix = torch.linalg.eigh(mean / size)[1][:, -count:].mH
    alone, eye = count == 1, torch.eye(len(mean), dtype=mean.dtype)
    for step in range(ALTERNATIONS if alone else 1):
        seen = weighted @ mix.mH  # [H, K, count]
        inner = mix @ seen + RIDGE * size * torch.eye(count, dtype=mean.dtype)
        factors = torch.linalg.solve(inner.mT, seen[heads, owners][..., None])[..., 0]
        if not alone or step == ALTERNATIONS - 1:
            break
        left = torch.einsum("h,hij->ij", factors[:, 0].abs().square().to(mean.dtype), weighted)
        right = torch.einsum("h,hj->j", factors[:, 0].conj(), weighted[heads, owners])
        left = left + 1e-6 * left.diagonal().real.mean().clamp_min(1e-30) * eye
        mix = torch.linalg.solve(left.mT, right)[None]
        mix = mix / mix.norm().clamp_min(1e-30)
    return mix, factors
