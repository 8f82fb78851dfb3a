"""Linear least squares from sums over many rows, with a pull towards the present weights; held-back rows choose its strength.

Shapes: N rows, Z inputs, E outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upfit.calibration.products import rounded

ROUNDING = 1e-5  # share of the energy that sums in float32 cannot tell from nothing
RIDGES = (1.0, 1e-1, 1e-2, 1e-3)  # tried from tied to free, as long as a freer one does better on what is held back


@dataclass
class Moments:
    """Sums for a linear least squares t ≈ W z: `inputs` Σ w z zᵀ [Z, Z] and `cross` Σ w t zᵀ [E, Z], float64."""

    inputs: Tensor | None = None
    cross: Tensor | None = None
    energy: float = 0.0  # Σ w |t|²

    @rounded()
    def add(self, z: Tensor, target: Tensor, weight: Tensor) -> None:
        """Add rows `z` [N, Z] and `target` [N, E] with weights [N]."""
        weighted = z * weight[:, None]
        inputs, cross = weighted.T @ z, target.T @ weighted
        # In place, for of a wide layer each of these is a gigabyte.
        self.inputs = inputs.double() if self.inputs is None else self.inputs.add_(inputs)
        self.cross = cross.double() if self.cross is None else self.cross.add_(cross)
        self.energy += float((target * weight[:, None]).double().flatten() @ target.double().flatten())

    def error(self, weight: Tensor) -> float:
        """Σ w |W z − t|² as a share of Σ w |t|²."""
        assert self.inputs is not None and self.cross is not None
        lost = float(((weight @ self.inputs) * weight).sum() - 2 * (weight * self.cross).sum()) + self.energy
        return lost / max(self.energy, 1e-30)  # targets of all zeros: no division by 0


def ridge(fit: Moments, held: Moments, prior: Tensor, strengths: Sequence[float]) -> tuple[Tensor, float]:
    """W [E, Z] that fits `fit`, drawn to `prior` with the one of `strengths` (of each input's own power, strongest first)
    that does best on `held`, and that strength; `prior` itself and infinity where none does better."""
    assert fit.inputs is not None and fit.cross is not None
    prior = prior.double()
    best, chosen, error = prior, float("inf"), held.error(prior)
    before = float("inf")
    if error < ROUNDING:
        return prior.float(), chosen
    power = fit.inputs.diagonal()
    power = power + 1e-4 * power.mean() + 1e-30  # inputs that are silent on this text, or all 0, hold to the prior too
    for strength in strengths:
        system = fit.inputs.clone().mT  # symmetric; by columns, as LAPACK wants it, so that it works in place
        system.diagonal().add_(strength * power)
        failed = torch.empty((), dtype=torch.int32, device=system.device)
        torch.linalg.cholesky_ex(system, out=(system, failed))
        if int(failed):
            continue
        # Two triangular solves, for cholesky_solve would copy the factor.
        half = torch.linalg.solve_triangular(system, (fit.cross + prior * (strength * power)).T, upper=False)
        trial = torch.linalg.solve_triangular(system.mT, half, upper=True).T
        del system, half
        trial_error = held.error(trial)
        if trial_error >= before:
            break
        before = trial_error
        if trial_error < error - ROUNDING / 10:
            best, chosen, error = trial, strength, trial_error
    return best.float(), chosen


def augmented(inputs: Tensor, width: int) -> Tensor:
    """`inputs` [.., E], with a column of ones where the weights are one wider."""
    return inputs if inputs.shape[-1] == width else torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)


def ridge_linear(sums: dict[bool, Moments], module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The ridge solution for a Linear, drawn to what it holds: weight and bias. `sums[True]` are of held-back rows."""
    prior = module.weight if module.bias is None else torch.cat([module.weight, module.bias[:, None]], 1)
    solution, _ = ridge(sums[False], sums[True], prior, RIDGES)
    return (solution, None) if module.bias is None else (solution[:, :-1], solution[:, -1])
