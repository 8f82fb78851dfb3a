"""Least squares for the output of the attention: shared values together with the output projection.

Shapes: N sampled rows, H query heads, n of them in a group, g old heads in a group, V value width, E hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.calibration.products import rounded
from upfit.calibration.ridge import Moments

ROUNDS = 3  # outputs and values in turn; it ends before where what is held back gains nothing
ITERATIONS = 6  # conjugate gradients a round
RIDGES = (1.0, 0.1)  # of each input's own power, towards the closed form, for rows are few; the first round chooses
NEGLIGIBLE = 1e-9  # a share of the energy that is rounding: what is fitted so well is left alone


@dataclass(frozen=True)
class Mixed:
    """Sampled rows: `values` [N, G, n, g·V], every old value of its group as each query head's attention mixes it, and what the
    layer's attention gave out [N, E] with a weight [N]. `gates` [N, G, n, V] multiply what is mixed, where there are any."""

    values: Tensor
    target: Tensor
    weight: Tensor
    gates: Tensor | None = None


def together(parts: list[Mixed]) -> Mixed:
    """The rows of all `parts`."""
    gates = [part.gates for part in parts if part.gates is not None]
    values, target, weight = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "target", "weight"))
    return Mixed(values, target, weight, torch.cat(gates) if gates else None)


def refine_values(fit: Mixed, held: Mixed, down: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Alternating least squares of the shared values `down` [G, V, g·V] and the output projection `outputs` [E, G, n, V] for
    the layer's own output; a round counts only if the held-back rows gain. Returns both, improved."""
    prior = outputs.flatten(1)
    best, error = (down, outputs), error_of(held, down, outputs)
    if error < NEGLIGIBLE * float((held.target.square().sum(1) * held.weight).sum()):
        return best

    def improved(down: Tensor, ridge: float) -> tuple[float, Tensor, Tensor]:
        new_outputs = improve_outputs(fit, down, prior, ridge).reshape(outputs.shape)
        new_down = _improve_down(fit, down, new_outputs)
        return error_of(held, new_down, new_outputs), new_down, new_outputs

    ridge, trial = min(((ridge, improved(down, ridge)) for ridge in RIDGES), key=lambda tried: tried[1][0])
    for left in reversed(range(ROUNDS)):
        if trial[0] >= error:
            break
        error, best = trial[0], trial[1:]
        if left:
            trial = improved(best[0], ridge)
    return best


def refine_outputs(fit: Mixed, held: Mixed, outputs: Tensor) -> tuple[float, Tensor]:
    """The output projection [E, G, n, V] for values [N, G, n, V] that are new already, and its error on the held-back rows: as
    it is, or drawn to that by the ridge that these like best."""
    alone = torch.eye(outputs.shape[-1], device=outputs.device).expand(outputs.shape[1], -1, -1)
    error = error_of(held, alone, outputs)
    if error < NEGLIGIBLE * float((held.target.square().sum(1) * held.weight).sum()):
        return error, outputs
    solved = [improve_outputs(fit, alone, outputs.flatten(1), ridge).reshape(outputs.shape) for ridge in RIDGES]
    return min(((error_of(held, alone, each), each) for each in (outputs, *solved)), key=lambda tried: tried[0])


def better_start(held: Mixed, starts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of pairs (down, outputs) as in `refine_values` the one that the held-back rows like best."""
    return min(starts, key=lambda start: error_of(held, *start))


def _mixed(rows: Mixed, down: Tensor) -> Tensor:
    """Shared values as each head mixes them [N, G·n·V]."""
    heads = rows.values.shape[2]
    mixed = [rows.values[:, group].flatten(0, 1) @ own.T for group, own in enumerate(down)]
    together = torch.stack([part.unflatten(0, (-1, heads)) for part in mixed], 1)
    return (together if rows.gates is None else together * rows.gates).flatten(1)


def _outputs_of(rows: Mixed, down: Tensor, outputs: Tensor) -> Tensor:
    return _mixed(rows, down) @ outputs.flatten(1).T


def error_of(rows: Mixed, down: Tensor, outputs: Tensor) -> float:
    gap = _outputs_of(rows, down, outputs) - rows.target
    return float((gap.square().sum(1) * rows.weight).sum())


def improve_outputs(rows: Mixed, down: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """The output projection [E, G·n·V] for these shared values, drawn to `prior`."""
    moments = Moments()
    moments.add(_mixed(rows, down), rows.target, rows.weight)
    assert moments.inputs is not None and moments.cross is not None
    power = ridge * (moments.inputs.diagonal() + 1e-4 * moments.inputs.diagonal().mean() + 1e-30)
    solved = torch.linalg.solve(moments.inputs + torch.diag(power), (moments.cross + prior.double() * power).T).T
    return solved.to(prior.dtype)


@rounded()
def _improve_down(rows: Mixed, down: Tensor, outputs: Tensor) -> Tensor:
    """A few conjugate-gradient iterations on `down` [G, V, g·V] with the output projection held, each row of it scaled by its
    own weight in the output."""
    scale = 1 / (outputs.square().sum((0, 2)) + 1e-2 * outputs.square().sum((0, 2)).mean() + 1e-30)[..., None]  # [G, V, 1]
    flat, shape = outputs.flatten(1), outputs.shape[1:]
    gram = flat.T @ flat

    def pulled(back: Tensor) -> Tensor:
        """What `back` [N, G·n·V], weighted gaps through the output projection, pulls on `down`."""
        parts = (back * rows.weight[:, None]).unflatten(1, shape)
        parts = parts if rows.gates is None else parts * rows.gates
        return torch.stack([parts[:, group].flatten(0, 1).T @ rows.values[:, group].flatten(0, 1) for group in range(shape[0])])

    residual = pulled(rows.target @ flat - _mixed(rows, down) @ gram)
    return descend(down, residual, lambda change: pulled(_mixed(rows, change) @ gram), scale, ITERATIONS)


def descend(start: Tensor, residual: Tensor, curvature: Callable[[Tensor], Tensor], scale: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients from `start` for least squares: `residual` is minus half the slope there, `curvature` half the second
    derivative times a change, and `scale` about the inverse of its diagonal. All of one shape, but what broadcasts to it."""
    best, direction = start, residual * scale
    power = (residual * direction).sum()
    for _ in range(iterations):
        image = curvature(direction)
        bend = (direction * image).sum()
        if not float(bend) > 0:
            break
        length = power / bend
        best, residual = best + length * direction, residual - length * image
        turned = residual * scale
        new_power = (residual * turned).sum()
        direction, power = turned + new_power / power * direction, new_power
    return best
