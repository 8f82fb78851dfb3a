"""One latent for unrotated keys and values: the joint reduction of rank in two metrics of the inputs.

    min over D [r, E], U_K, U_V of   tr (A_K − U_K D) C_K (·)ᵀ + tr (A_V − U_V D) C_V (·)ᵀ

Rows of A_K and A_V are what keys and values are of the inputs, in a metric in which both terms are errors of the layer's
output; C_K and C_V are moments of the inputs as keys and as values see them. The two differ, so it is no plain SVD. Two exact
steps in turn: U from D by least squares; D from U by a Sylvester equation, which two diagonalisations make a division.

Shapes: E inputs, r latent width. All float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.calibration.reduction import powers

ROUNDS = 8  # each lowers the error; after so many it hardly moves
FLOOR = 1e-7  # of a moment's largest eigenvalue: directions that the text does not have
LEAST = 1e-6  # of a weight that both metrics share: a division by less is one by rounding


@dataclass(frozen=True)
class Metrics:
    """A basis z of the inputs, x = `basis` z, in which C_K is diag(`keys`) and C_V diag(1 − `keys`); `back` is its inverse."""

    basis: Tensor
    back: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Joint:
    """`down` D [r, E], `keys` U_K, `values` U_V; `lost`: shares of the keys' and of the values' energy that are not kept."""

    down: Tensor
    keys: Tensor
    values: Tensor
    lost: tuple[float, float]


def together(of_keys: Tensor, of_values: Tensor) -> Metrics:
    """The basis that diagonalises both moments [E, E]."""
    root, inverse = powers(of_keys + of_values, FLOOR)
    shares, vectors = torch.linalg.eigh(inverse @ of_keys @ inverse)
    return Metrics(root @ vectors, vectors.T @ inverse, shares.clamp(0, 1))


def joint(keys: Tensor, values: Tensor, metrics: Metrics, rank: int) -> Joint:
    """The latent for `keys` A_K [.., E] and `values` A_V [.., E], narrower than both together."""
    t = metrics.keys
    a, b = keys @ metrics.basis, values @ metrics.basis
    down = torch.linalg.svd(torch.cat([a * t.sqrt(), b * (1 - t).sqrt()]), full_matrices=False)[2][:rank]
    for _ in range(ROUNDS):
        u, v = _readers(a, b, t, down)
        of_keys = u.T @ u
        root, inverse = powers(of_keys + v.T @ v, 1e-12)
        share, turn = torch.linalg.eigh(inverse @ of_keys @ inverse)
        share, turn = share.clamp(0, 1)[:, None], inverse @ turn
        wanted = turn.T @ (u.T @ (a * t) + v.T @ (b * (1 - t)))
        down = turn @ (wanted / (share * t + (1 - share) * (1 - t)).clamp_min(LEAST))
        down = torch.linalg.qr(down.T)[0].T
    u, v = _readers(a, b, t, down)
    lost = (_lost(a, u @ down, t), _lost(b, v @ down, 1 - t))
    return Joint(down @ metrics.back, u, v, lost)


def separate(keys: Tensor, values: Tensor, metrics: Metrics, of_keys: int, of_values: int) -> Joint:
    """As `joint`, with the first `of_keys` numbers of the latent for keys alone and `of_values` others for values: what heads
    that are merged into one do."""
    parts = []
    for rows, t, rank in ((keys, metrics.keys, of_keys), (values, 1 - metrics.keys, of_values)):
        seen = rows @ metrics.basis
        up, sizes, _ = torch.linalg.svd(seen * t.sqrt(), full_matrices=False)
        up = up[:, :rank]
        parts.append((up, up.T @ seen, float(sizes[rank:].square().sum() / sizes.square().sum().clamp_min(1e-30))))
    (u, down_k, lost_k), (v, down_v, lost_v) = parts
    u = torch.nn.functional.pad(u, (0, down_v.shape[0]))
    v = torch.nn.functional.pad(v, (down_k.shape[0], 0))
    return Joint(torch.cat([down_k, down_v]) @ metrics.back, u, v, (lost_k, lost_v))


def _readers(a: Tensor, b: Tensor, t: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """U_K and U_V by least squares on the latent."""
    small = 1e-9 * torch.eye(len(down), dtype=down.dtype)

    def reader(rows: Tensor, z: Tensor) -> Tensor:
        return torch.linalg.solve((down * z) @ down.T + small, ((rows * z) @ down.T).T).T

    return reader(a, t), reader(b, 1 - t)


def _lost(rows: Tensor, near: Tensor, weights: Tensor) -> float:
    return float(((rows - near).square() * weights).sum() / (rows.square() * weights).sum().clamp_min(1e-30))
