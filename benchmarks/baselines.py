"""What others cut keys and values down to, by decompositions alone: pure functions, for `latent_baselines.py`.

- `weighted_svd`: the best W' of a rank for E|(W − W') x|² with the moment C = E[x xᵀ] of the inputs, by an SVD of W C^½: CARE
  (Zhou et al. 2026, arXiv 2603.17946) and SVD-LLM V2 (Wang et al. 2025, arXiv 2503.12340), for which the factor of C does not
  matter. What is cached lies before the rotation: at every step keys are made of it again, and rotated.
- `dealt_ranks`: ranks by layer, as CARE's release c3c2126 deals them (CARE-E). How SVD-LLM V2 spreads its own is not rebuilt.
- `transmla`: rotated keys that heads share and one latent for the rest (Meng et al. 2025, arXiv 2502.07864; release 9c0d254).
  RoRoPE: one rotation mixes the heads' dimensions of one frequency, first and second halves alike, by the principal components
  of keys. FreqFold: `fold` neighbouring frequencies are mixed as if they were one. The first components of each group turn, the
  others no longer do. K is balanced against V by norms, and principal components of both are the latent, without a norm.

Shapes: E inputs (E' with a column for biases), K key/value heads, D and V head widths, P rotated pairs, r rank. All float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.convert.mla.layer import Latent, Source, even

FLOOR = 1e-9  # of a moment's mean: directions that the text does not have


@dataclass(frozen=True)
class Factors:
    """W ≈ `up` [D, r] · `down` [r, E]; `sizes` [min(D, E)]: the singular values of W C^½, all of them."""

    down: Tensor
    up: Tensor
    sizes: Tensor

    @property
    def product(self) -> Tensor:
        return self.up @ self.down


def weighted_svd(weight: Tensor, moment: Tensor, rank: int, ridge: float = 0.0) -> Factors:
    """`weight` [D, E] cut to `rank`, its inputs weighed by `moment` [E, E], with `ridge` times its mean on its diagonal."""
    eye = torch.eye(len(moment), dtype=moment.dtype)
    values, vectors = torch.linalg.eigh(moment + (ridge + FLOOR) * moment.diagonal().mean() * eye)
    root = values.clamp_min(FLOOR * float(values.mean())).sqrt()
    left, sizes, right = torch.linalg.svd(weight @ vectors * root, full_matrices=False)
    down = (sizes[:rank, None] * right[:rank] / root) @ vectors.T
    return Factors(down, left[:, :rank], sizes)


def joint_svd(
    keys: Tensor, values: Tensor, moment: Tensor, rank: int, balance: float, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`keys` and `values` [.., E] as they come of one latent of `rank`, K balanced as of `ratio`."""
    unit = ratio(keys, values, moment, balance)
    both = weighted_svd(torch.cat([keys / unit, values]), moment, rank, ridge).product
    return both[: len(keys)] * unit, both[len(keys) :]


def ratio(keys: Tensor, values: Tensor, moment: Tensor, balance: float) -> float:
    """What keys are divided by before they stand beside values: how much larger the mean root mean square of their dimensions
    is, over `balance`."""
    sizes = [torch.einsum("de,ef,df->d", rows, moment, rows).clamp_min(0).sqrt().mean() for rows in (keys, values)]
    return max(float(sizes[0]), 1e-30) / (max(float(sizes[1]), 1e-30) * balance)


def dealt_ranks(sizes: Sequence[Tensor], rank: int, most: int) -> list[int]:
    """The rank of each layer, in the mean `rank` and never over `most`, from the singular values of its weighted matrix.

    Half of it to each; then one by one to the layer where the next singular value is most of the energy still left out, times
    √(layers behind it, over their mean), over √(its rank, over the least).
    """
    energies = [own.square() for own in sizes]
    least, layers = max(1, rank // 2), len(energies)
    ranks = [least] * layers
    for _ in range(layers * (rank - least)):
        gains = []
        for place, (energy, own) in enumerate(zip(energies, ranks, strict=True)):
            left = max(float(energy[own:].sum()), 1e-12 * float(energy.sum()))
            gain = float(energy[own]) / left if own < min(most, len(energy)) else -1.0
            gains.append(gain * (2 * (layers - place) / (layers + 1)) ** 0.5 / (own / least) ** 0.5)
        best = max(range(layers), key=gains.__getitem__)
        if gains[best] < 0:
            break
        ranks[best] += 1
    return ranks


@dataclass(frozen=True)
class Components:
    """Keys in the rotated basis: `keys` [2, G, K·M, E'] of both halves of a pair, G groups of M neighbouring pairs, largest
    components first; `turn` [G, K·M, K·M] orthogonal, its columns the components in (head, pair of the group)."""

    keys: Tensor
    turn: Tensor


def components(source: Source, moment: Tensor, fold: int) -> Components:
    """Principal components of keys over the heads and `fold` neighbouring frequencies, the same for both halves."""
    halves = source.k[:, : 2 * source.pairs].unflatten(1, (2, -1, fold))  # [K, 2, G, M, E']
    halves = halves.permute(1, 2, 0, 3, 4).flatten(2, 3)
    energy = torch.einsum("sgie,ef,sgjf->gij", halves, moment, halves)
    turn = torch.linalg.eigh(energy)[1].flip(-1)
    return Components(torch.einsum("gij,sgie->sgje", turn, halves), turn)


def transmla(source: Source, sums: dict[str, Tensor], slots: Sequence[int], width: int, fold: int, balance: float) -> Latent:
    """The layer with rotated keys on the pairs `slots` and a latent of `width`; `sums` as of `sums.py`, of which the moment of
    the inputs is used.

    `slots` are as many of each group of `fold` neighbouring pairs, at equal distances: the first components of each group turn
    as they do. All pairs, `fold` 1 and a latent that holds the rest: the layer computes what its keys without the turn of the
    other components say; with one key/value head the same as before.
    """
    moment, pairs = sums["inputs"], source.pairs
    parts, own = components(source, moment, fold), len(slots) * fold // pairs
    count, heads = len(source.k), source.owners
    mix = parts.turn.unflatten(1, (count, fold))  # [G, K, M, K·M]
    queries = source.q[:, : 2 * pairs].unflatten(1, (2, -1, fold))  # [H, 2, G, M, E']
    rotated_q = torch.einsum("ghmn,hsgme->hsgne", mix[:, heads, :, :own], queries).flatten(1, 3)
    rotated_k = parts.keys[:, :, :own].flatten(0, 2)
    rest = torch.cat([parts.keys[:, :, own:].flatten(0, 2), source.k[:, 2 * pairs :].flatten(0, 1)])
    down, up_rest, up_v = balanced_pca(rest, source.v.flatten(0, 1), moment, width, balance)
    up_k = _of_heads(mix[..., own:], up_rest, source)
    latent = Latent(
        torch.cat([rotated_q, source.q], 1),
        torch.cat([rotated_k, down]),
        up_k,
        up_v.unflatten(0, (count, -1)),
        source.o,
        tuple(slots),
    )
    return even(latent, sums)


def balanced_pca(keys: Tensor, values: Tensor, moment: Tensor, width: int, balance: float) -> tuple[Tensor, Tensor, Tensor]:
    """The latent [width, E'] that principal components of balanced keys and values are, and what makes both of it again."""
    unit = ratio(keys, values, moment, balance)
    both = torch.cat([keys / unit, values])
    basis = torch.linalg.eigh(both @ moment @ both.T)[1].flip(-1)[:, :width]
    return basis.T @ both, unit * basis[: len(keys)], basis[len(keys) :]


def _of_heads(mix: Tensor, up_rest: Tensor, source: Source) -> Tensor:
    """[K, D, r]: what of each head's keys does not turn, from the latent. `mix` [G, K, M, components that do not turn]."""
    groups, count, _, left = mix.shape
    turning = up_rest[: 2 * groups * left].unflatten(0, (2, groups, left))
    turning = torch.einsum("gkmn,sgnr->ksgmr", mix, turning).flatten(1, 3)
    return torch.cat([turning, up_rest[2 * groups * left :].unflatten(0, (count, -1))], 1)
