"""Fits query and key projections to given attention scores: Gauss–Newton in the metric of the softmax.

The error of a row of scores s under the teacher's attention weights p is what the softmax sees of it to second order, its
variance under p: Σ p (δs)² − (Σ p δs)². Minimised over both projections at once by Gauss–Newton, each step a few iterations of
preconditioned conjugate gradients on inputs that are whitened first; steps end when held-back windows stop gaining.

Shapes: B windows, T tokens, R sampled query positions, L keys they look at, H query heads, G new key/value heads, D head width,
E input width (one more where the projections have biases). Head dimensions are in `AttentionTraits.order`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upfit.calibration.traits import Turns

NEGLIGIBLE = 1e-9  # a share of the energy that is rounding
Norm = Callable[[Tensor], Tensor]


@dataclass
class Target:
    """What the sampled rows of one batch should score. `at` [R], `scores` and `weights` [B, H, R, L], `importance` [B, H, R,
    1]."""

    at: Tensor
    keys: int
    scores: Tensor
    weights: Tensor
    importance: Tensor

    def seen(self, scores: Tensor) -> Tensor:
        """The metric applied to `scores`: importance · (p s − p Σ p s)."""
        weighted = self.weights * scores
        mean = weighted.sum(-1, keepdim=True)
        return weighted.addcmul_(self.weights, mean, value=-1).mul_(self.importance)


@dataclass
class Batch:
    """Student inputs of one batch, [B, T, E], and its targets; [B, S, E] of keys where these are made of something else."""

    inputs: Tensor
    targets: list[Target]
    of_keys: Tensor | None = None

    @property
    def key_inputs(self) -> Tensor:
        return self.inputs if self.of_keys is None else self.of_keys

    def rows(self) -> Tensor:
        return torch.cat([target.at for target in self.targets])


@dataclass(frozen=True)
class Weights:
    """q [H·D, E] and k [G·D, E]."""

    q: Tensor
    k: Tensor

    def plus(self, other: "Weights", factor: float) -> "Weights":
        return Weights(self.q + factor * other.q, self.k + factor * other.k)

    def dot(self, other: "Weights") -> Tensor:
        return (self.q * other.q).sum() + (self.k * other.k).sum()


@dataclass(frozen=True)
class Form:
    """How projections become scores: the rotation, norms of queries and keys [B, T, heads, D] (None: none), head counts."""

    turns: Turns
    q_norm: Norm | None
    k_norm: Norm | None
    heads: int
    kv_heads: int
    width: int
    scaling: float


@dataclass(frozen=True)
class Effort:
    """How hard to try: Gauss–Newton steps, and conjugate-gradient iterations in each."""

    steps: int = 4
    iterations: int = 5


def turn(x: Tensor, factors: Tensor, back: bool = False) -> Tensor:
    """Rotate the pairs of `x` [B, T, heads, D] by complex `factors` [T, P]; `back` multiplies by their conjugates (the
    adjoint)."""
    pairs = factors.shape[1]
    if pairs == 0:
        return x
    cos, sin = factors.real[:, None], (-factors.imag if back else factors.imag)[:, None]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    turned = [first * cos - second * sin, first * sin + second * cos]
    return torch.cat([*turned, x[..., 2 * pairs :]], -1)


class Side:
    """Queries or keys of one batch at one point: their values, and how a change of the projection changes them."""

    def __init__(self, inputs: Tensor, weight: Tensor, factors: Tensor, norm: Norm | None, width: int) -> None:
        self.inputs, self.factors, self.norm, self.width = inputs, factors, norm, width
        self.projected = self._heads(weight)
        self.values = turn(norm(self.projected) if norm else self.projected, factors)

    def _heads(self, weight: Tensor) -> Tensor:
        return (self.inputs @ weight.T).unflatten(-1, (-1, self.width))

    def push(self, change: Tensor) -> Tensor:
        moved = self._heads(change)
        if self.norm:
            moved = torch.func.jvp(self.norm, (self.projected,), (moved,))[1]
        return turn(moved, self.factors)

    def pull(self, gradient: Tensor) -> Tensor:
        gradient = turn(gradient, self.factors, back=True)
        if self.norm:
            gradient = torch.func.vjp(self.norm, self.projected)[1](gradient)[0]
        return gradient.flatten(2).flatten(0, 1).T @ self.inputs.flatten(0, 1)


class Fit:
    """The least-squares problem over some batches, in whitened coordinates."""

    def __init__(self, batches: list[Batch], form: Form, q_basis: Tensor, k_basis: Tensor) -> None:
        self.form, self.batches = form, batches
        self.rows = [batch.rows() for batch in batches]
        self.q_inputs = [_solve(q_basis, b.inputs[:, rows]) for b, rows in zip(batches, self.rows, strict=True)]
        self.k_inputs = [_solve(k_basis, b.key_inputs) for b in batches]
        self.total = sum(float((t.seen(t.scores) * t.scores).sum()) for b in batches for t in b.targets)

    def sides(self, weights: Weights) -> Iterator[tuple[Batch, Side, Side]]:
        form = self.form
        for batch, rows, q_in, k_in in zip(self.batches, self.rows, self.q_inputs, self.k_inputs, strict=True):
            q = Side(q_in, weights.q, form.turns.q[rows], form.q_norm, form.width)
            k = Side(k_in, weights.k, form.turns.k[: k_in.shape[1]], form.k_norm, form.width)
            yield batch, q, k

    def error(self, weights: Weights) -> float:
        """Weighted squared error of the scores as a share of the target's."""
        lost = 0.0
        for batch, q, k in self.sides(weights):
            for target, part in self._parts(batch):
                gap = self._scores(q.values[:, part], k.values[:, : target.keys]).sub_(target.scores)
                lost += float((target.seen(gap) * gap).sum())
        return lost / max(self.total, 1e-30)  # no division by 0

    def gradient(self, sides: list[tuple[Batch, Side, Side]]) -> Weights:
        """Minus half the gradient of the error (unnormalised) at the point of `sides`."""

        def gap(index: int, target: Target, part: slice) -> Tensor:
            _, q, k = sides[index]
            return target.scores - self._scores(q.values[:, part], k.values[:, : target.keys])

        return self._pulled(sides, gap)

    def curvature(self, sides: list[tuple[Batch, Side, Side]], change: Weights) -> Weights:
        """Gauss–Newton matrix times `change`."""
        moved = [(q.push(change.q), k.push(change.k)) for _, q, k in sides]

        def shift(index: int, target: Target, part: slice) -> Tensor:
            _, q, k = sides[index]
            dq, dk = moved[index]
            by_q = self._scores(dq[:, part], k.values[:, : target.keys])
            return by_q.add_(self._scores(q.values[:, part], dk[:, : target.keys]))

        return self._pulled(sides, shift)

    def _pulled(self, sides: list[tuple[Batch, Side, Side]], scores: Callable[[int, Target, slice], Tensor]) -> Weights:
        """What a change of scores pulls on the projections, summed over all batches: the adjoint of their Jacobian."""
        result: Weights | None = None
        for index, (batch, q, k) in enumerate(sides):
            gq, gk = torch.zeros_like(q.values), torch.zeros_like(k.values)
            for target, part in self._parts(batch):
                self._back(target.seen(scores(index, target, part)), q.values, k.values, part, target.keys, gq, gk)
            pulled = Weights(q.pull(gq), k.pull(gk))
            result = pulled if result is None else result.plus(pulled, 1.0)
        assert result is not None
        return result

    def _parts(self, batch: Batch) -> Iterator[tuple[Target, slice]]:
        start = 0
        for target in batch.targets:
            yield target, slice(start, start + len(target.at))
            start += len(target.at)

    def _grouped(self, q: Tensor) -> Tensor:
        """[B, R, H, D] → [B, G, n·R, D]"""
        return q.unflatten(2, (self.form.kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = self._grouped(q) @ k.permute(0, 2, 3, 1)
        return scores.unflatten(2, (-1, q.shape[1])).flatten(1, 2).mul_(self.form.scaling)

    def _back(self, seen: Tensor, q: Tensor, k: Tensor, part: slice, keys: int, gq: Tensor, gk: Tensor) -> None:
        """Add to `gq`, `gk` what the weighted scores `seen` [B, H, R, L] pull on queries and keys."""
        form = self.form
        grouped = seen.unflatten(1, (form.kv_heads, -1)).flatten(2, 3)  # [B, G, n·R, L]
        to_q = (grouped @ k[:, :keys].transpose(1, 2)).unflatten(2, (-1, part.stop - part.start))
        gq[:, part] += to_q.flatten(1, 2).transpose(1, 2) * form.scaling
        gk[:, :keys] += (grouped.mT @ self._grouped(q[:, part])).transpose(1, 2) * form.scaling


def _solve(basis: Tensor, inputs: Tensor) -> Tensor:
    """Whitened inputs: rows x with E[x xᵀ] = basis·basisᵀ become rows with unit covariance."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return torch.linalg.solve_triangular(basis, flat.T, upper=False).T.reshape(inputs.shape).contiguous()


def whitening(moment: Tensor, ridge: float) -> Tensor:
    """Cholesky factor (float32) of `moment` + `ridge`·(mean of its diagonal); weights W become W·factor."""
    moment = moment.double()
    damped = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(damped).float()


@dataclass(frozen=True)
class Fitted:
    weights: Weights
    before: tuple[float, float]  # error on the fitted and on the held-back rows
    after: tuple[float, float]


def fit_scores(
    batches: list[Batch], held: list[Batch], form: Form, start: Weights, q_moment: Tensor, k_moment: Tensor, effort: Effort
) -> Fitted:
    """Improve `start` on `batches`; a step counts only if the `held` batches gain too. Moments are E[x xᵀ] [E, E] of the inputs
    of queries and, weighted as the attention weighs them, of keys."""
    q_basis, k_basis = whitening(q_moment, 1e-4), whitening(k_moment, 1e-3)
    fit, check = Fit(batches, form, q_basis, k_basis), Fit(held, form, q_basis, k_basis)
    point = best = Weights(start.q @ q_basis, start.k @ k_basis)
    error, held_error = fit.error(point), check.error(point)
    before = (error, held_error)
    scale: Weights | None = None
    for _ in range(effort.steps):
        if held_error < NEGLIGIBLE:
            break
        sides = list(fit.sides(point))
        if scale is None:
            scale = _preconditioner(fit, sides, point)
        step = _conjugate_gradients(fit, sides, fit.gradient(sides), scale, effort.iterations)
        length, improved = 1.0, None
        for _ in range(4):
            trial = point.plus(step, length)
            trial_error = fit.error(trial)
            if trial_error < error:
                improved = trial
                break
            length /= 2
        if improved is None:
            break
        trial_held = check.error(improved)
        if trial_held > held_error:
            break
        point = best = improved
        error, held_error = trial_error, trial_held
    weights = Weights(_unwhiten(best.q, q_basis), _unwhiten(best.k, k_basis))
    return Fitted(weights, before, (error, held_error))


def held_error(held: list[Batch], form: Form, weights: Weights) -> float:
    """Error of the scores that `weights`, on inputs as they are, make of the `held` rows."""
    q_plain, k_plain = (torch.eye(weight.shape[1], device=weight.device) for weight in (weights.q, weights.k))
    return Fit(held, form, q_plain, k_plain).error(weights)


def _unwhiten(weight: Tensor, basis: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(basis, weight, upper=False, left=False)


def _preconditioner(fit: Fit, sides: list[tuple[Batch, Side, Side]], like: Weights) -> Weights:
    """One over the diagonal of the curvature for each output row, estimated from one random vector of signs (Hutchinson)."""
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in (like.q, like.k)]
    of_q = fit.curvature(sides, Weights(signs[0], torch.zeros_like(signs[1]))).q
    of_k = fit.curvature(sides, Weights(torch.zeros_like(signs[0]), signs[1])).k
    rows = [(curvature * sign).mean(1, keepdim=True).clamp_min(0) for curvature, sign in zip((of_q, of_k), signs, strict=True)]
    return Weights(*(1 / (row + 1e-2 * row.mean() + 1e-30) for row in rows))  # rows of little curvature take no giant steps


def _conjugate_gradients(
    fit: Fit, sides: list[tuple[Batch, Side, Side]], residual: Weights, scale: Weights, iterations: int
) -> Weights:
    def scaled(w: Weights) -> Weights:
        return Weights(w.q * scale.q, w.k * scale.k)

    solution = Weights(torch.zeros_like(residual.q), torch.zeros_like(residual.k))
    direction = scaled(residual)
    power = residual.dot(direction)
    for _ in range(iterations):
        image = fit.curvature(sides, direction)
        bend = direction.dot(image)
        if not float(bend) > 0:
            break
        length = float(power / bend)
        solution, residual = solution.plus(direction, length), residual.plus(image, -length)
        turned = scaled(residual)
        new_power = residual.dot(turned)
        direction, power = turned.plus(direction, float(new_power / power)), new_power
    return solution
