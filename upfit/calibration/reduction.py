"""Square roots of moments, and the reduction of rank that a metric asks for."""

import torch
from torch import Tensor

TINY = 1e-12  # a share of float64's energy that is rounding; its 1e-10th only keeps a division from 0


def powers(matrix: Tensor, floor: float = 1e-9) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a symmetric positive matrix, its smallest eigenvalues raised to `floor` times the
    largest."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(floor * float(values[-1:].clamp_min(TINY).sum())).sqrt()  # of a matrix of no rows too
    return (vectors * root) @ vectors.mH, (vectors / root) @ vectors.mH


def reduce(moment: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """`up` [n, rank] and `down` [rank, n] that minimise E‖x − up·down·x‖² in `metric` [n, n], for E[x xᵀ] = `moment` [n, n],
    and the share of the energy that is lost. Directions come strongest first."""
    root, inverse = powers(metric)
    values, vectors = torch.linalg.eigh(root @ moment @ root)
    strongest = vectors[:, -rank:].flip(1)
    lost = values.clamp_min(0)[: len(values) - rank].sum() / values.clamp_min(0).sum().clamp_min(TINY)
    return inverse @ strongest, strongest.mH @ root, float(lost)
