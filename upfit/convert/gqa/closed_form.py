"""Merging the key/value heads of a group after bringing them into one basis: closed forms on calibration statistics.

Everything is a linear map on what the projections give out, so it applies to weights and biases alike. Dimensions are in
`AttentionTraits.order`: the first of every rotated pair (fastest first), the second of every pair, then the free ones. Shapes,
for one group: g old key/value heads, n query heads, D head width, P rotated pairs, V value width, E hidden width. All float64.

- Values: v_j ≈ U_j v', v' = P [v_1 … v_g]; exact when the group's values span V dimensions. O takes up U_j.
- Rotated pairs: a complex factor commutes with the rotation, so k_j ≈ u k', k' = Σ p_j k_j on each pair, with a factor u for
  each query head, which its query takes up conjugated.
- Slow pairs (`cut` and slower) and free dimensions: there the rotation is near the identity (or is it), so any real linear map
  nearly commutes with it, and the group's keys are reduced together to as many dimensions as there are places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upfit.calibration.reduction import TINY, powers, reduce
from upfit.calibration.traits import AttentionTraits

AVERAGED = -1  # in the place of a cut: keys are not turned before they are merged
ALTERNATIONS = 8  # each lowers the error; after so many it hardly moves


@dataclass(frozen=True)
class KeyMerge:
    """New key = `keys` [D, g·D] · [k_1 … k_g]; new query of head h = `queries` [n, D, D][h] · q_h."""

    keys: Tensor
    queries: Tensor


@dataclass(frozen=True)
class ValueMerge:
    """New value = `values` [V, g·V] · [v_1 … v_g]; O's columns of head h, which used old head j: O_h · `outputs` [g, V,
    V][j]. `lost`: the share of the energy that is not kept, of `power` in all."""

    values: Tensor
    outputs: Tensor
    lost: float
    power: float


def merge_values(moment: Tensor, metric: Tensor, width: int) -> ValueMerge:
    """`moment` [g·V, g·V] of the values, `metric` [g·V, g·V] of the output projection (block-diagonal Σ O_hᵀO_h)."""
    up, down, lost = reduce(moment, metric, width)
    return ValueMerge(down, up.unflatten(0, (-1, width)), lost, float((moment * metric).sum()))


def as_rotations(merged: ValueMerge) -> ValueMerge:
    """The same merge with new values in the basis in which the maps to the old ones, `outputs` [n, V, V], are as near rotations
    as they can be: a norm that follows lets rotations pass."""
    root, inverse = powers((merged.outputs.mT @ merged.outputs).mean(0))
    return replace(merged, values=root @ merged.values, outputs=merged.outputs @ inverse)


def merge_gated_values(moments: Tensor, outputs: Tensor, owners: Tensor) -> ValueMerge:
    """Of values that a gate multiplies dimension by dimension before the output projection: each dimension keeps the one
    combination of the group's, v' = Σ p_j v_j, that loses least, with a factor for each query head, which its columns of the
    projection take up. `moments` [n, V, g, g] of what the heads' attention makes of the values, gated; `outputs` [n, E, V];
    `ValueMerge.outputs` [n, V, V] is of query heads here."""
    energy, width = outputs.square().sum(1), outputs.shape[2]  # [n, V]
    mix, factors = _one_per_pair(moments, energy, owners, normed=False)
    places, heads = torch.arange(width), torch.arange(len(owners))
    values = torch.zeros(width, mix.shape[1], width, dtype=mix.dtype)
    values[places, :, places] = mix
    seen = torch.einsum("hvij,vj->hvi", moments, mix)
    own = moments[heads, :, owners, owners]
    left = own - 2 * factors * seen[heads, :, owners] + factors.square() * torch.einsum("vi,hvi->hv", mix, seen)
    lost, power = float((energy * left).sum().clamp_min(0)), float((energy * own).sum())
    return ValueMerge(values.flatten(1), torch.diag_embed(factors), lost / max(power, TINY), power)


def output_metric(outputs: Tensor, owners: Tensor, count: int) -> Tensor:
    """Block-diagonal [g·V, g·V] of Σ O_hᵀO_h over the query heads of each old head. `outputs` [n, E, V], `owners` [n] in
    0…g−1."""
    blocks = [_gram(outputs[owners == old]) for old in range(count)]
    return torch.block_diag(*blocks)


def output_gram(outputs: Tensor, heads: Sequence[int]) -> Tensor:
    """Σ O_hᵀO_h [V, V] over some heads of `outputs` [E, H, V]."""
    chosen = outputs[:, list(heads)]
    return torch.einsum("ehv,ehw->vw", chosen, chosen)


def _gram(heads: Tensor) -> Tensor:
    return torch.einsum("hev,hew->vw", heads, heads)


def merge_keys(traits: AttentionTraits, keys: Tensor, pairs: Tensor, queries: Tensor, owners: Tensor, cut: int) -> KeyMerge:
    """`keys` [g·D, g·D] and `pairs` complex [n, P, g, g] are centred moments of the group's keys, `queries` [n, D, D] of its
    queries, `owners` [n] says which of the g old heads a query head used. Pairs from `cut` on count as slow; AVERAGED: the mean
    of the heads.

    Where the layer norms its keys only what survives a norm is done: turning pairs, exactly where its scales agree on each.
    """
    count, width = keys.shape[0] // len(traits.order), len(traits.order)
    if cut == AVERAGED:
        same = torch.eye(width, dtype=keys.dtype).repeat(1, count) / count
        return KeyMerge(same, torch.eye(width, dtype=keys.dtype).expand(len(owners), -1, -1).clone())
    fast = traits.pairs if traits.normed else cut
    slow = torch.tensor(slow_places(traits, fast), dtype=torch.long)
    new_keys = torch.zeros(width, count * width, dtype=keys.dtype)
    new_queries = torch.zeros(len(owners), width, width, dtype=keys.dtype)
    if fast:
        first, second = torch.arange(fast), traits.pairs + torch.arange(fast)
        energy = queries.diagonal(dim1=1, dim2=2)[:, first] + queries.diagonal(dim1=1, dim2=2)[:, second]  # [n, fast]
        mix, factors = _one_per_pair(pairs[:, :fast], energy, owners, traits.normed)
        for old in range(count):
            _place(new_keys[:, old * width : (old + 1) * width], mix[:, old], first, second)
        for head, factor in enumerate(factors.conj()):
            _place(new_queries[head], factor, first, second)
    if len(slow) and traits.normed:  # free dimensions, which a norm forbids to mix
        new_queries[:, slow, slow] = 1
        for old in range(count):
            new_keys[slow, old * width + slow] = 1 / count
    elif len(slow):
        joint = torch.cat([old * width + slow for old in range(count)])
        metric = torch.block_diag(*[queries[owners == old].sum(0)[slow][:, slow] for old in range(count)])
        up, down, _ = reduce(keys[joint][:, joint], metric, len(slow))
        scale = (down @ keys[joint][:, joint] @ down.T).diagonal().mean() / keys[joint, joint].mean().clamp_min(TINY)
        scale = scale.clamp_min(TINY).sqrt()
        new_keys[slow[:, None], joint] = down / scale
        for head, old in enumerate(owners.tolist()):
            new_queries[head][slow[:, None], slow] = (up[old * len(slow) : (old + 1) * len(slow)] * scale).T
    return KeyMerge(new_keys, new_queries)


def slow_places(traits: AttentionTraits, cut: int) -> list[int]:
    """Dimensions that are reduced together, in the order in which they get the strongest directions: free, then slowest."""
    free = list(range(2 * traits.pairs, len(traits.order)))
    return free + [place for pair in reversed(range(cut, traits.pairs)) for place in (pair, traits.pairs + pair)]


def _place(matrix: Tensor, factors: Tensor, first: Tensor, second: Tensor) -> None:
    """Write multiplication by complex `factors` on each pair (first, second) into the real `matrix` [D, D]."""
    matrix[first, first], matrix[first, second] = factors.real, -factors.imag
    matrix[second, first], matrix[second, second] = factors.imag, factors.real


def _one_per_pair(pairs: Tensor, energy: Tensor, owners: Tensor, normed: bool) -> tuple[Tensor, Tensor]:
    """Coefficients [P, g] of the shared key and factors [n, P] of the query heads; minimises Σ_h energy_h E|k_own − c_h p·k|².

    Alternating least squares from the leading eigenvector; both steps are closed forms on each pair. With `normed` only phases.
    """
    heads = torch.arange(len(owners))
    weighted = pairs * energy[:, :, None, None]
    share = torch.stack([energy[owners == old].sum(0) for old in range(pairs.shape[-1])], 1)  # [P, g]
    root = share.clamp_min(TINY).sqrt().to(pairs.dtype)
    mean = weighted.sum(0) / share.sum(1).clamp_min(TINY)[:, None, None]
    _, vectors = torch.linalg.eigh(root[:, :, None] * mean * root[:, None])
    mix = vectors[:, :, -1].conj() * root
    if normed:
        mix = mix / mix.abs().clamp_min(TINY) / mix.shape[1]
        factors = (mix.conj() / mix.abs().clamp_min(TINY))[:, owners].T
        return mix, factors
    ridge = torch.eye(pairs.shape[-1], dtype=pairs.dtype)
    for step in range(ALTERNATIONS):
        seen = torch.einsum("hpij,pj->hpi", weighted, mix.conj())
        power = torch.einsum("pi,hpi->hp", mix, seen).real.clamp_min(TINY * 1e-10)
        factors = seen[heads, :, owners] / power
        if step == ALTERNATIONS - 1:
            break
        left = torch.einsum("hp,hpij->pij", factors.abs().square().to(pairs.dtype), weighted)
        right = torch.einsum("hp,hpj->pj", factors.conj(), weighted[heads, :, owners])
        left = left + (1e-6 * left.diagonal(dim1=1, dim2=2).real.mean(1).clamp_min(TINY * 1e-10))[:, None, None] * ridge
        mix = torch.linalg.solve(left.mT, right)
        mix = mix / mix.abs().square().sum(1, keepdim=True).clamp_min(TINY * 1e-10).sqrt()
    own = pairs.diagonal(dim1=2, dim2=3).real.mean((0, 2)).clamp_min(TINY * 1e-10)  # energy of an old key, on each pair
    new = torch.einsum("pi,hpij,pj->p", mix, pairs, mix.conj()).real.clamp_min(TINY * 1e-10) / len(owners)
    scale = (own / new).sqrt()
    return mix * scale[:, None], factors / scale


def key_error(traits: AttentionTraits, merged: KeyMerge, keys: Tensor, queries: Tensor, owners: Tensor) -> tuple[float, float]:
    """Predicted squared error of the scores with queries and keys taken as independent, Σ_h tr(Q_h Δ_h C Δ_hᵀ), and the
    scores' own.

    Takes the rotation for the identity on slow pairs, so it is too small where the cut is low.
    """
    width, lost, total = len(traits.order), 0.0, 0.0
    for head, old in enumerate(owners.tolist()):
        own = torch.zeros_like(merged.keys)
        own[:, old * width : (old + 1) * width] = torch.eye(width, dtype=keys.dtype)
        gap = own - merged.queries[head].T @ merged.keys
        lost += float(((gap.T @ queries[head] @ gap) * keys).sum())
        total += float(((own.T @ queries[head] @ own) * keys).sum())
    return lost, total
