"""Attention scores as a least-squares problem in the query and key projections: its error, gradient and curvature.

The error of a row of scores s under the teacher's attention weights p is what the softmax sees of it to second order, its
variance under p: Σ p (δs)² − (Σ p δs)².

Shapes: B windows, T tokens, R sampled query positions, L keys they look at, H query heads, G new key/value heads, n = H/G, D
head width, E input width (one more where the projections have biases); N rows, of all windows one after the other. Head
dimensions are in `AttentionTraits.order`. All of one float type.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upfit.calibration.products import rounded
from upfit.calibration.rotation import Turns

Norm = Callable[[Tensor], Tensor]


@dataclass
class Target:
    """What the sampled rows of one batch should score. `at` [R], `scores` and `weights` [B, H, R, L], `importance` [B, H, R,
    1], 1 on average: in units of `unit`, what a score's squared error costs in the output of the attention over the energy of
    the stream there."""

    at: Tensor
    keys: int
    scores: Tensor
    weights: Tensor
    importance: Tensor
    unit: float = 1.0


@dataclass
class Batch:
    """Student inputs of one batch, [B, T, E], and its targets; [B, S, E] of keys where these are made of something else; its
    own turns, where they are not as the `Form` says for all."""

    inputs: Tensor
    targets: list[Target]
    of_keys: Tensor | None = None
    turns: Turns | None = None

    @property
    def key_inputs(self) -> Tensor:
        return self.inputs if self.of_keys is None else self.of_keys


@dataclass(frozen=True)
class Weights:
    """q [H·D, E] and k [G·D, E]."""

    q: Tensor
    k: Tensor

    def plus(self, other: "Weights", factor: float) -> "Weights":
        return Weights(self.q + factor * other.q, self.k + factor * other.k)

    def times(self, other: "Weights") -> "Weights":
        return Weights(self.q * other.q, self.k * other.k)

    def dot(self, other: "Weights") -> Tensor:
        return (self.q * other.q).sum() + (self.k * other.k).sum()


@dataclass(frozen=True)
class Form:
    """How projections become scores: the rotation, norms of queries and keys [B, T, heads, D] (None: none), which come before
    the rotation or, with `norm_last`, behind it; head counts. A norm may be any function, of queries also one that changes
    their width, which is `q_width` where they are projected (None: `width`)."""

    turns: Turns
    q_norm: Norm | None
    k_norm: Norm | None
    heads: int
    kv_heads: int
    width: int
    scaling: float
    norm_last: bool = False
    q_width: int | None = None


@dataclass(frozen=True)
class Turn:
    """A rotation of the pairs of [.., N, heads, D] by complex factors [N, P]."""

    cos: Tensor  # [N, 1, D]
    sin: Tensor
    pairs: int

    @staticmethod
    def of(factors: Tensor, width: int) -> "Turn":
        rest = factors.real.new_zeros(len(factors), width - 2 * factors.shape[1])
        cos = torch.cat([factors.real, factors.real, rest + 1], 1)
        sin = torch.cat([-factors.imag, factors.imag, rest], 1)
        return Turn(cos[:, None], sin[:, None], factors.shape[1])

    def __call__(self, x: Tensor, back: bool = False) -> Tensor:
        """`x` turned; `back`: by the conjugates (the adjoint)."""
        if self.pairs == 0:
            return x
        first, second, rest = x[..., : self.pairs], x[..., self.pairs : 2 * self.pairs], x[..., 2 * self.pairs :]
        return torch.addcmul(x * self.cos, torch.cat([second, first, rest], -1), self.sin, value=-1 if back else 1)


class Side:
    """Queries or keys of all windows: `inputs` [N, E], and how a projection [heads·D, E] and a change of it make values: heads
    that are turned and normed (or normed and turned), times `scale`."""

    def __init__(
        self, inputs: Tensor, factors: Tensor, norm: Norm | None, form: Form, scale: float = 1.0, width: int | None = None
    ) -> None:
        self.inputs, self.norm, self.norm_last = inputs, norm, form.norm_last
        self.turn, self.width, self.scale = Turn.of(factors, form.width), width or form.width, scale

    def project(self, weight: Tensor) -> Tensor:
        """[1, N, heads, D]"""
        return (self.inputs @ weight.T).unflatten(-1, (-1, self.width))[None]

    def _shaped(self, heads: Tensor) -> Tensor:
        if self.norm is None:
            return self.turn(heads) * self.scale
        return (self.norm(self.turn(heads)) if self.norm_last else self.turn(self.norm(heads))) * self.scale

    def values(self, projected: Tensor) -> Tensor:
        """[N, heads, D]"""
        return self._shaped(projected)[0]

    def push(self, projected: Tensor, change: Tensor) -> Tensor:
        """How the values move with a `change` of the weight, where they are made of `projected`."""
        moved = self.project(change)
        if self.norm is None:
            return self._shaped(moved)[0]
        return torch.func.jvp(self._shaped, (projected,), (moved,))[1][0]

    def pull(self, projected: Tensor, gradient: Tensor) -> Tensor:
        """The adjoint of `push`: [heads·D, E] for a gradient by the values."""
        if self.norm is None:
            gradient = self.turn(gradient * self.scale, back=True)
        else:
            gradient = torch.func.vjp(self._shaped, projected)[1](gradient[None])[0][0]
        return gradient.flatten(1).T @ self.inputs


@dataclass(frozen=True)
class Window:
    """One window's rows that share a range of keys, of one group of n query heads: where they stand in the problem's `rows` and
    `keys`, and views [n·R, L] and [n·R, 1] of their target."""

    rows: slice
    keys: slice
    group: int
    scores: Tensor
    weights: Tensor
    importance: Tensor
    looked: Tensor  # [1, L]: the share of all weights that falls on a key; 0 where sinks take a part of them

    def centred(self, gap: Tensor, q: Tensor, mean_key: Tensor) -> tuple[Tensor, Tensor]:
        """`gap` [n·R, L], the scores of `q` [n·R, D], less the target's, less its mean under p (in place); and that mean, for
        `mean_key` [n·R, D] = Σ p k."""
        mean = (q * mean_key).sum(-1, keepdim=True) - (self.weights * self.scores).sum(-1, keepdim=True)
        return gap.sub_(self.scores).sub_(mean), mean


class Problem:
    """The least squares over some batches, on inputs whitened by `q_basis` and `k_basis`."""

    def __init__(self, batches: list[Batch], form: Form, q_basis: Tensor, k_basis: Tensor) -> None:
        self.form, self.windows, self.total = form, list[Window](), 0.0
        queries, keys, q_turns, k_turns = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        row = position = 0
        for batch in batches:
            k, turns = whitened(k_basis, batch.key_inputs), batch.turns or form.turns
            count, length = k.shape[:2]
            keys.append(k.flatten(0, 1))
            k_turns.append(_factors(turns.k, length, slice(length)).repeat(count, 1))
            for target in batch.targets:
                q = whitened(q_basis, batch.inputs[:, target.at])
                queries.append(q.flatten(0, 1))
                q_turns.append(_factors(turns.q, len(target.at), target.at).repeat(count, 1))
                for number in range(count):
                    start = position + number * length
                    places = slice(row, row + len(target.at)), slice(start, start + target.keys)
                    self.windows += _windows(target, number, places, form.kv_heads)
                    row += len(target.at)
            position += count * length
        self.total = sum(_energy(window) for window in self.windows)
        self.q = Side(torch.cat(queries), torch.cat(q_turns), form.q_norm, form, form.scaling, form.q_width)
        self.k = Side(torch.cat(keys), torch.cat(k_turns), form.k_norm, form)

    def of_window(self, window: Window, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[n·R, D] of `q` [N, H, D] and [L, D] of `k` [N', G, D], less the mean that the rows look at: a softmax does not see
        it, and products with rounded factors suffer from it."""
        size = self.form.heads // self.form.kv_heads
        heads = slice(window.group * size, (window.group + 1) * size)
        own = k[window.keys, window.group]
        return q[window.rows, heads].transpose(0, 1).flatten(0, 1), own - window.looked @ own

    def error(self, weights: Weights) -> float:
        """Weighted squared error of the scores as a share of the target's."""
        q, k = self.q.values(self.q.project(weights.q)), self.k.values(self.k.project(weights.k))
        lost = 0.0
        for window in self.windows:
            own_q, own_k = self.of_window(window, q, k)
            gap, mean = window.centred(own_q @ own_k.T, own_q, window.weights @ own_k)
            lost += _variance(window, gap.square_().mul_(window.weights), mean)
        return lost / max(self.total, 1e-30)  # no division by 0


class Point:
    """A problem at some weights: its `error` there, minus half the gradient of it (unnormalised), and its curvature."""

    def __init__(self, problem: Problem, weights: Weights) -> None:
        self.problem = problem
        self.projected = problem.q.project(weights.q), problem.k.project(weights.k)
        self.q, self.k = problem.q.values(self.projected[0]), problem.k.values(self.projected[1])
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # q [n·R, D], k [L, D] and Σ p k [n·R, D] of each window
        lost, pulls = 0.0, self._empty()
        for window in problem.windows:
            q, k = problem.of_window(window, self.q, self.k)
            mean_key = window.weights @ k
            self.parts.append((q, k, mean_key))
            gap, mean = window.centred(q @ k.T, q, mean_key)
            weighted = gap * window.weights
            lost += _variance(window, gap.mul_(weighted), mean)
            self._back(window, weighted.neg_(), q, k, pulls)
        self.error = lost / max(problem.total, 1e-30)
        self.gradient = self._pulled(pulls)

    @rounded()
    def curvature(self, change: Weights) -> Weights:
        """Gauss–Newton matrix times `change`."""
        problem = self.problem
        all_dq, all_dk = problem.q.push(self.projected[0], change.q), problem.k.push(self.projected[1], change.k)
        pulls = self._empty()
        for window, (q, k, mean_key) in zip(problem.windows, self.parts, strict=True):
            dq, dk = problem.of_window(window, all_dq, all_dk)
            mean = (dq * mean_key).sum(-1, keepdim=True) + (q * (window.weights @ dk)).sum(-1, keepdim=True)
            moved = torch.cat([dq, q], 1) @ torch.cat([k, dk], 1).T
            self._back(window, moved.sub_(mean).mul_(window.weights), q, k, pulls)
        return self._pulled(pulls)

    def _empty(self) -> tuple[Tensor, Tensor]:
        return torch.empty_like(self.q), torch.zeros_like(self.k)

    def _back(self, window: Window, seen: Tensor, q: Tensor, k: Tensor, pulls: tuple[Tensor, Tensor]) -> None:
        """Add to `pulls` what `seen` [n·R, L], weighted scores, pulls on queries and keys; importance is applied here."""
        size = self.problem.form.heads // self.problem.form.kv_heads
        heads = slice(window.group * size, (window.group + 1) * size)
        to_q = (seen @ k) * window.importance
        pulls[0][window.rows, heads] = to_q.unflatten(0, (size, -1)).transpose(0, 1)
        pulls[1][window.keys, window.group] += seen.T @ (q * window.importance)

    def _pulled(self, pulls: tuple[Tensor, Tensor]) -> Weights:
        problem = self.problem
        return Weights(problem.q.pull(self.projected[0], pulls[0]), problem.k.pull(self.projected[1], pulls[1]))


def _factors(turns: Tensor, count: int, at: slice | Tensor) -> Tensor:
    """The factors [count, P] of the positions `at`; where nothing turns there may be more positions than `turns` has."""
    return turns[at] if turns.shape[1] else turns.new_empty(count, 0)


def _windows(target: Target, number: int, places: tuple[slice, slice], groups: int) -> Iterator[Window]:
    """Window `number` of a target's batch, a part for each group of heads."""
    parts = (target.scores[number], target.weights[number], target.importance[number])
    for group, own in enumerate(zip(*(part.chunk(groups) for part in parts), strict=True)):
        scores, weights, importance = (part.flatten(0, 1) for part in own)
        whole = weights.sum(-1, keepdim=True)
        looked = weights.sum(0, keepdim=True) / whole.sum().clamp_min(1e-30)
        sinks = bool((whole < 1 - 1e-3).any())
        yield Window(*places, group, scores, weights, importance, torch.zeros_like(looked) if sinks else looked)


def _energy(window: Window) -> float:
    mean = (window.weights * window.scores).sum(-1, keepdim=True)
    return _variance(window, (window.scores - mean).square_().mul_(window.weights), mean)


def _variance(window: Window, squares: Tensor, mean: Tensor) -> float:
    """Σ importance · variance under p, for `squares` [n·R, L], p times the squared distances from the `mean` [n·R, 1]. Where
    sinks take a part of p, which no score moves, that part is as far from the mean as 0 is."""
    sink = (1 - window.weights.sum(-1, keepdim=True)).clamp_min(0)
    return float(((squares.sum(-1, keepdim=True) + sink * mean.square()) * window.importance).sum())


def whitened(basis: Tensor, inputs: Tensor) -> Tensor:
    """Rows x with E[x xᵀ] = basis·basisᵀ become rows with unit covariance."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return torch.linalg.solve_triangular(basis, flat.T, upper=False).T.reshape(inputs.shape).contiguous()


def input_moments(problems: list[Batch], q_width: int, k_width: int) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ [E', E'] of the inputs of queries and, weighted as the attention looks at them, of keys."""
    q_moment, k_moment = (torch.zeros(size, size, device=problems[0].inputs.device) for size in (q_width, k_width))
    for problem in problems:
        flat = problem.inputs.flatten(0, 1)
        q_moment = q_moment + flat.T @ flat
        for target in problem.targets:
            sharp = torch.addcmul(target.weights, target.weights, target.weights, value=-1)
            looked = (target.importance.flatten(1)[:, None] @ sharp.flatten(1, 2))[:, 0]  # [B, L]
            seen = problem.key_inputs[:, : target.keys]
            k_moment = k_moment + (seen * looked[..., None]).flatten(0, 1).T @ seen.flatten(0, 1)
    return q_moment, k_moment


def norm_in_order(module: nn.Module, order: list[int]) -> Norm:
    """`module`, which norms heads as the model stores them, on heads whose dimensions are in `AttentionTraits.order`."""
    back = torch.tensor(order).argsort().tolist()

    def norm(heads: Tensor) -> Tensor:
        normed: Tensor = module(heads[..., back])
        return normed[..., order]

    return norm
