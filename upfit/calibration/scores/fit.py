"""Fits query and key projections to given attention scores (`problem.py`), over both projections at once.

Gauss–Newton, each step some iterations of preconditioned conjugate gradients on inputs that are whitened first, drawn to the
start by a ridge; steps end when held-back windows stop gaining. Early steps are short: far from the end their direction is
worth little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.calibration.scores.problem import Batch, Form, Point, Problem, Weights

NEGLIGIBLE = 1e-6  # a share of the energy that is rounding
RIDGE = 0.3  # of the mean curvature of each output row
SHORTEST = 0.5  # share of a step that is tried last


@dataclass(frozen=True)
class Effort:
    """How hard to try: conjugate-gradient iterations of each Gauss–Newton step."""

    iterations: tuple[int, ...] = (3, 6, 12)


@dataclass(frozen=True)
class Penalty:
    """What a change Δ of the key projection [G·D, E] costs besides scores: tr(metric · Δ · moment · Δᵀ), with `metric` [G·D,
    G·D] and `moment` [E, E] symmetric, in the units of the score errors' sum."""

    metric: Tensor
    moment: Tensor

    def whitened(self, basis: Tensor) -> "Penalty":
        """The same for a projection times `basis`."""
        half = torch.linalg.solve_triangular(basis, self.moment.to(basis), upper=False)
        return Penalty(self.metric.to(basis), torch.linalg.solve_triangular(basis, half.T, upper=False))

    def pull(self, change: Tensor) -> Tensor:
        """Half the gradient by Δ."""
        return self.metric @ change @ self.moment

    def cost(self, change: Tensor) -> float:
        return float((self.pull(change) * change).sum())


@dataclass(frozen=True)
class Fitted:
    weights: Weights
    before: float  # error on the held-back rows
    after: float


def fit_scores(
    batches: list[Batch],
    held: list[Batch],
    form: Form,
    start: Weights,
    q_moment: Tensor,
    k_moment: Tensor,
    effort: Effort,
    penalty: Penalty | None = None,
) -> Fitted:
    """Improve `start` on `batches`; a step counts only if the `held` batches gain. Moments are E[x xᵀ] [E, E] of the inputs of
    queries and, weighted as the attention weighs them, of keys. `penalty`: where keys serve for something else too."""
    q_basis, k_basis = whitening(q_moment, 1e-4), whitening(k_moment, 1e-3)
    problem, check = Problem(batches, form, q_basis, k_basis), Problem(held, form, q_basis, k_basis)
    best = Weights(start.q @ q_basis, start.k @ k_basis)
    before = error = check.error(best)
    first, curvature = best, None
    besides = None if penalty is None else penalty.whitened(k_basis)

    def judged(weights: Weights) -> float:
        """The held-back error, and what the penalty takes as a share of the same energy."""
        cost = 0.0 if besides is None else besides.cost(weights.k - first.k)
        return check.error(weights) + cost / max(problem.total, 1e-30)  # no division by 0

    for iterations in effort.iterations:
        if error < NEGLIGIBLE:
            break
        point = Point(problem, best)
        if curvature is None:
            curvature = _row_curvature(point, best)
        step = _conjugate_gradients(point, curvature, best.plus(first, -1.0), iterations, besides)
        trial, trial_error = _tried(judged, best, step, error)
        if trial_error >= error:
            break
        best, error = trial, trial_error
    return Fitted(Weights(_unwhiten(best.q, q_basis), _unwhiten(best.k, k_basis)), before, error)


def held_error(held: list[Batch], form: Form, weights: Weights) -> float:
    """Error of the scores that `weights`, on inputs as they are, make of the `held` rows."""
    q_plain, k_plain = (torch.eye(weight.shape[1], device=weight.device) for weight in (weights.q, weights.k))
    return Problem(held, form, q_plain, k_plain).error(weights)


def whitening(moment: Tensor, ridge: float) -> Tensor:
    """Cholesky factor (float32) of `moment` + `ridge`·(mean of its diagonal); weights W become W·factor."""
    moment = moment.double()
    damped = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(damped).float()


def _unwhiten(weight: Tensor, basis: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(basis, weight, upper=False, left=False)


def _tried(judged: Callable[[Weights], float], best: Weights, step: Weights, error: float) -> tuple[Weights, float]:
    """The longest share of `step` from `best` that lowers the `judged` error, and that error; the shortest where none does."""
    length = 1.0
    while True:
        trial = best.plus(step, length)
        trial_error = judged(trial)
        if trial_error < error or length <= SHORTEST:
            return trial, trial_error
        length /= 2


def _row_curvature(point: Point, like: Weights) -> Weights:
    """The diagonal of the curvature, [H·D, 1] and [G·D, 1]: of each output row, estimated from one random vector of signs
    (Hutchinson)."""
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in (like.q, like.k)]
    of_q = point.curvature(Weights(signs[0], torch.zeros_like(signs[1]))).q
    of_k = point.curvature(Weights(torch.zeros_like(signs[0]), signs[1])).k
    rows = [(curvature * sign).mean(1, keepdim=True).clamp_min(0) for curvature, sign in zip((of_q, of_k), signs, strict=True)]
    return Weights(*(row + 1e-2 * row.mean() + 1e-30 for row in rows))  # rows of little curvature take no giant steps


def _conjugate_gradients(
    point: Point, curvature: Weights, moved: Weights, iterations: int, penalty: Penalty | None = None
) -> Weights:
    """The step that the Gauss–Newton form asks for at `point`, with the ridge towards where the fit began, `moved` away, and
    the `penalty` of having moved."""
    pull = Weights(RIDGE * curvature.q, RIDGE * curvature.k)
    scale = Weights(1 / (curvature.q + pull.q), 1 / (curvature.k + pull.k))

    def drawn(change: Weights) -> Weights:
        back = pull.times(change)
        return back if penalty is None else Weights(back.q, back.k + penalty.pull(change.k))

    residual = point.gradient.plus(drawn(moved), -1.0)
    solution = Weights(torch.zeros_like(residual.q), torch.zeros_like(residual.k))
    direction = residual.times(scale)
    power = residual.dot(direction)
    for _ in range(iterations):
        image = point.curvature(direction).plus(drawn(direction), 1.0)
        bend = direction.dot(image)
        if not float(bend) > 0:
            break
        length = float(power / bend)
        solution, residual = solution.plus(direction, length), residual.plus(image, -length)
        turned = residual.times(scale)
        new_power = residual.dot(turned)
        direction, power = turned.plus(direction, float(new_power / power)), new_power
    return solution
