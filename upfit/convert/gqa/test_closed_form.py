"""The steps of aligned merging, each by its own law: exact where it promises to be, best where it cannot be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upfit.calibration import fit_values
from upfit.calibration.reduction import powers, reduce
from upfit.calibration.ridge import Moments, ridge
from upfit.calibration.rotation import Turns
from upfit.calibration.scores import fit as fit_scores
from upfit.calibration.scores.problem import Batch, Form, Point, Problem, Target, Weights
from upfit.calibration.traits import AttentionTraits
from upfit.convert.gqa import closed_form
from upfit.convert.gqa.grouping import partition

HEADS, OLD, PAIRS, FREE, HIDDEN = 6, 3, 4, 2, 20
WIDTH = 2 * PAIRS + FREE


def traits(normed: bool = False, factors: bool = True) -> AttentionTraits:
    speeds = tuple(0.5**pair for pair in range(PAIRS))
    return AttentionTraits(True, True, normed, factors, True, PAIRS, tuple(range(WIDTH)), speeds, None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factored(base: Tensor, factor: Tensor) -> Tensor:
    """`base` [N, WIDTH] with every pair multiplied by its complex factor [PAIRS]."""
    turned = torch.complex(base[:, :PAIRS], base[:, PAIRS : 2 * PAIRS]) * factor
    return torch.cat([turned.real, turned.imag, base[:, 2 * PAIRS :]], 1)


def moments(keys: list[Tensor], queries: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of keys of each old head and queries of each query head, as calibration would leave them."""
    joint = torch.cat(keys, 1)
    turned = torch.stack([torch.complex(k[:, :PAIRS], k[:, PAIRS : 2 * PAIRS]) for k in keys])  # [g, N, P]
    pairs = torch.einsum("inp,jnp->pij", turned, turned.conj()).expand(len(queries), -1, -1, -1)
    per = len(queries) // len(keys)
    return joint.T @ joint, pairs, torch.stack([q.T @ q for q in queries]), torch.arange(len(keys)).repeat_interleave(per)


def test_roots_are_those_of_a_matrix_without_its_smallest_directions() -> None:
    """Nothing is divided by less than 1e-9 of the largest; of nothing at all, by the least that float64 can be divided by."""
    basis = torch.linalg.qr(drawn(4, 4))[0]
    values, raised = (torch.tensor(numbers, dtype=torch.float64) for numbers in ([0, 1e-12, 1, 4], [4e-9, 4e-9, 1, 4]))
    root, inverse = powers(basis @ torch.diag(values) @ basis.T)
    torch.testing.assert_close(root @ root, basis @ torch.diag(raised) @ basis.T, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(root @ inverse, torch.eye(4, dtype=torch.float64))
    assert all(power.isfinite().all() for power in powers(torch.zeros(3, 3, dtype=torch.float64)))


@pytest.mark.parametrize("cut", [0, 2, PAIRS])
def test_keys_in_different_bases_merge_exactly(cut: int) -> None:
    """Heads whose keys are one key, turned and stretched on each pair: the merged scores are the old ones, at any cut."""
    base = drawn(200, WIDTH)
    factors = [torch.complex(drawn(PAIRS, seed=j), drawn(PAIRS, seed=j + 9)) for j in range(OLD)]
    keys = [factored(base, factor) for factor in factors]
    queries = [drawn(50, WIDTH, seed=20 + h) for h in range(HEADS)]
    merged = closed_form.merge_keys(traits(), *moments(keys, queries), cut)
    new_key = torch.cat(keys, 1) @ merged.keys.T
    for head in range(HEADS):
        old = queries[head] @ keys[head * OLD // HEADS].T
        new = (queries[head] @ merged.queries[head].T) @ new_key.T
        torch.testing.assert_close(new, old, rtol=0, atol=1e-9 * float(old.abs().max()))


def test_fast_pairs_are_only_multiplied() -> None:
    """What is done to a rotated pair commutes with its rotation: a complex factor, for keys and for queries."""
    keys, queries = [drawn(99, WIDTH, seed=j) for j in range(OLD)], [drawn(50, WIDTH, seed=9 + h) for h in range(HEADS)]
    merged = closed_form.merge_keys(traits(), *moments(keys, queries), 2)
    for matrix in (*merged.queries, *merged.keys.split(WIDTH, 1)):
        for pair in range(2):
            block = matrix[[pair, PAIRS + pair]][:, [pair, PAIRS + pair]]
            torch.testing.assert_close(block[0, 0], block[1, 1])
            torch.testing.assert_close(block[0, 1], -block[1, 0])
            assert torch.count_nonzero(matrix[pair]) <= 2


def test_norms_allow_only_turns() -> None:
    keys, queries = [drawn(99, WIDTH, seed=j) for j in range(OLD)], [drawn(50, WIDTH, seed=9 + h) for h in range(HEADS)]
    turned = closed_form.merge_keys(traits(normed=True), *moments(keys, queries), 2)
    for matrix in turned.queries:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(WIDTH, dtype=torch.float64))
    plain = closed_form.merge_keys(traits(normed=True, factors=False), *moments(keys, queries), closed_form.AVERAGED)
    torch.testing.assert_close(torch.cat(keys, 1) @ plain.keys.T, torch.stack(keys).mean(0))


def test_key_merge_beats_the_mean_and_the_first() -> None:
    keys = [drawn(400, WIDTH, seed=j) @ drawn(WIDTH, WIDTH, seed=50 + j) for j in range(OLD)]
    queries = [drawn(90, WIDTH, seed=9 + h) for h in range(HEADS)]
    covariance, pairs, of_queries, owners = moments(keys, queries)
    same = torch.eye(WIDTH, dtype=torch.float64)
    plain = same.expand(HEADS, -1, -1)
    rivals = [
        closed_form.KeyMerge(same.repeat(1, OLD) / OLD, plain),
        closed_form.KeyMerge(torch.cat([same, 0 * same, 0 * same], 1), plain),
    ]
    ours = closed_form.merge_keys(traits(), covariance, pairs, of_queries, owners, PAIRS)
    errors = [closed_form.key_error(traits(), merged, covariance, of_queries, owners)[0] for merged in (ours, *rivals)]
    assert errors[0] < min(errors[1:])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_values_in_different_bases_merge_exactly(seed: int) -> None:
    width = 5
    base = drawn(100, width, seed=seed)
    olds = [base @ drawn(width, width, seed=seed + j) for j in range(OLD)]
    outputs = drawn(HEADS, HIDDEN, width, seed=seed + 7)
    owners = torch.arange(OLD).repeat_interleave(HEADS // OLD)
    joint = torch.cat(olds, 1)
    merged = closed_form.merge_values(joint.T @ joint, closed_form.output_metric(outputs, owners, OLD), width)
    for head, old in enumerate(owners.tolist()):
        new = (joint @ merged.values.T) @ (outputs[head] @ merged.outputs[old]).T
        expected = olds[old] @ outputs[head].T
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_full_rank_is_exact() -> None:
    joint = drawn(100, 12)
    up, down, lost = reduce(joint.T @ joint, torch.eye(12, dtype=torch.float64), 12)
    torch.testing.assert_close(up @ down, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)
    assert lost == 0


def test_partition_finds_what_belongs_together() -> None:
    """Planted groups, each head close to those of its own group only, in any order."""
    planted = [[0, 5, 6, 11], [1, 2, 8, 9], [3, 4, 7, 10]]
    costs = torch.ones(12, 12)
    for group in planted:
        costs[torch.tensor(group)[:, None], torch.tensor(group)] = 0.1
    assert partition(costs, 3) == planted
    assert partition(torch.ones(12, 12), 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def problem(norm: bool, sink: float = 0.0, last: bool = False) -> tuple[Problem, Weights, list[Batch], Form]:
    """Two windows, two targets of one batch, two new heads for six query heads; a share of the weights is a `sink`'s. `last`:
    norms stand behind the rotation."""
    tokens, kv_heads = 9, 2
    turns = torch.polar(torch.ones(tokens, PAIRS), torch.arange(tokens)[:, None] * 0.5 ** torch.arange(PAIRS))
    turns = turns.to(torch.complex128)
    targets = []
    for number, (rows, keys) in enumerate((([1, 3], 5), ([6, 8], 9))):
        at = torch.tensor(rows)
        allowed = torch.arange(keys)[None] <= at[:, None]
        wanted = drawn(2, HEADS, 2, keys, seed=number).masked_fill(~allowed, 0)
        weights = drawn(2, HEADS, 2, keys, seed=5).masked_fill(~allowed, float("-inf")).softmax(-1) * (1 - sink)
        targets.append(Target(at, keys, wanted, weights, drawn(2, HEADS, 2, 1, seed=3).abs()))
    batches = [Batch(drawn(2, tokens, HIDDEN, seed=8), targets)]
    scales = 1 + drawn(WIDTH, seed=9).abs()  # a norm's own, which tells before the rotation from behind it
    rms = (lambda x: x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * scales) if norm else None
    form = Form(Turns(turns, turns), rms, rms, HEADS, kv_heads, WIDTH, 0.3, last)
    basis = torch.eye(HIDDEN, dtype=torch.float64)
    point = Weights(drawn(HEADS * WIDTH, HIDDEN, seed=1), drawn(kv_heads * WIDTH, HIDDEN, seed=2))
    return Problem(batches, form, basis, basis), point, batches, form


def plain_scores(batch: Batch, form: Form, weights: Weights, target: Target) -> Tensor:
    """[B, H, R, L]: the scores as a model computes them, one head after the other."""
    sides = []
    for inputs, weight, factors, norm in (
        (batch.inputs[:, target.at], weights.q, form.turns.q[target.at], form.q_norm),
        (batch.key_inputs[:, : target.keys], weights.k, form.turns.k[: target.keys], form.k_norm),
    ):
        heads = (inputs @ weight.T).unflatten(-1, (-1, form.width))
        heads = norm(heads) if norm and not form.norm_last else heads
        turned = torch.complex(heads[..., :PAIRS], heads[..., PAIRS : 2 * PAIRS]) * factors[:, None]
        heads = torch.cat([turned.real, turned.imag, heads[..., 2 * PAIRS :]], -1)
        sides.append(norm(heads) if norm and form.norm_last else heads)
    q, k = sides
    share = form.heads // form.kv_heads
    return torch.stack([q[:, :, h] @ k[:, :, h // share].mT for h in range(form.heads)], 1) * form.scaling


def plain_error(target: Target, gap: Tensor) -> Tensor:
    """Σ importance · (Σ p δ² − (Σ p δ)²)"""
    mean = (target.weights * gap).sum(-1, keepdim=True)
    return (((target.weights * gap.square()).sum(-1, keepdim=True) - mean.square()) * target.importance).sum()


@pytest.mark.parametrize(
    ("norm", "sink", "last"), [(False, 0.0, False), (True, 0.0, False), (True, 0.0, True), (False, 0.3, False)]
)
def test_error_gradient_and_curvature_are_those_of_plain_scores(norm: bool, sink: float, last: bool) -> None:
    """Hand-written products equal autograd in float64: the error, its gradient, and JᵀMJ of its Gauss–Newton form."""
    fit, point, batches, form = problem(norm, sink, last)
    batch, targets = batches[0], batches[0].targets
    q, k = point.q.clone().requires_grad_(), point.k.clone().requires_grad_()

    def scored(q: Tensor, k: Tensor) -> list[Tensor]:
        return [plain_scores(batch, form, Weights(q, k), target) for target in targets]

    error = torch.stack([plain_error(t, s - t.scores) for t, s in zip(targets, scored(q, k), strict=True)]).sum()
    total = torch.stack([plain_error(t, t.scores) for t in targets]).sum()
    at = Point(fit, point)
    assert fit.error(point) == pytest.approx(float(error.detach() / total), rel=1e-9)
    assert at.error == pytest.approx(float(error.detach() / total), rel=1e-9)
    by_q, by_k = torch.autograd.grad(error, (q, k))
    torch.testing.assert_close(at.gradient.q, -by_q / 2)
    torch.testing.assert_close(at.gradient.k, -by_k / 2)
    change = Weights(drawn(*point.q.shape, seed=4), drawn(*point.k.shape, seed=5))
    moved = torch.func.jvp(lambda *w: tuple(scored(*w)), (point.q, point.k), (change.q, change.k))[1]
    expected = torch.stack([plain_error(t, m) for t, m in zip(targets, moved, strict=True)]).sum()
    image = at.curvature(change)
    torch.testing.assert_close(image.dot(change), expected)
    other = Weights(drawn(*point.q.shape, seed=6), drawn(*point.k.shape, seed=7))
    torch.testing.assert_close(image.dot(other), at.curvature(other).dot(change), msg="the curvature is symmetric")


def test_fitting_scores_reaches_what_can_be_reached() -> None:
    """Targets that some projections make exactly: the fit comes close from a disturbed start. Where held-back windows want the
    opposite, the start stays."""
    _, point, batches, form = problem(norm=False)
    batch = batches[0]
    start = point.plus(Weights(drawn(*point.q.shape, seed=6), drawn(*point.k.shape, seed=7)), 0.1)
    targets = [
        Target(t.at, t.keys, plain_scores(batch, form, point, t).float(), t.weights.float(), t.importance.float())
        for t in batch.targets
    ]
    single = [Batch(batch.inputs.float(), targets)]
    turns = Turns(form.turns.q.to(torch.complex64), form.turns.k.to(torch.complex64))
    small = Form(turns, None, None, form.heads, form.kv_heads, form.width, form.scaling)
    moment = batch.inputs.flatten(0, 1).T.float() @ batch.inputs.flatten(0, 1).float()
    begin = Weights(start.q.float(), start.k.float())
    done = fit_scores.fit_scores(single, single, small, begin, moment, moment, fit_scores.Effort((30,) * 8))
    assert done.before == pytest.approx(fit_scores.held_error(single, small, begin), rel=1e-3)
    assert done.after == pytest.approx(fit_scores.held_error(single, small, done.weights), rel=1e-2, abs=1e-6)
    assert done.after < 1e-2 * done.before
    against = [Batch(b.inputs, [replace(t, scores=-t.scores) for t in b.targets]) for b in single]
    result = fit_scores.fit_scores(single, against, small, begin, moment, moment, fit_scores.Effort((30,) * 8))
    assert result.after == result.before
    for stays, was in ((result.weights.q, begin.q), (result.weights.k, begin.k)):
        torch.testing.assert_close(stays, was, rtol=1e-4, atol=1e-4)


def test_the_ridge_draws_to_the_start() -> None:
    """At the start it pulls nothing; away from it, it takes the solution of (J + ridge·diag) where the gradient is none."""
    fit, point, _, _ = problem(norm=False)
    at = Point(fit, point)
    at.gradient = Weights(torch.zeros_like(point.q), torch.zeros_like(point.k))
    rows = Weights(torch.ones(len(point.q), 1).double(), torch.ones(len(point.k), 1).double())
    still = fit_scores._conjugate_gradients(at, rows, at.gradient, 50)
    assert float(still.dot(still)) == 0
    away = Weights(drawn(*point.q.shape, seed=4), drawn(*point.k.shape, seed=5))
    step = fit_scores._conjugate_gradients(at, rows, away, 400)
    image = at.curvature(step).plus(step, fit_scores.RIDGE)
    torch.testing.assert_close(image.q, -fit_scores.RIDGE * away.q, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(image.k, -fit_scores.RIDGE * away.k, rtol=1e-4, atol=1e-6)


def test_ridge_keeps_what_is_good() -> None:
    """Solves what the data decide, keeps the prior where it is right already, and where the data only mislead."""
    z, truth, prior = drawn(500, 8), drawn(3, 8, seed=1), drawn(3, 8, seed=2)
    ones = torch.ones(500, dtype=torch.float64)
    fit, held = Moments(), Moments()
    fit.add(z[:400], z[:400] @ truth.T, ones[:400])
    held.add(z[400:], z[400:] @ truth.T, ones[400:])
    solution, strength = ridge(fit, held, prior, (1e-6, 1.0))
    torch.testing.assert_close(solution.double(), truth, rtol=0, atol=1e-4)
    assert strength == 1e-6
    solution, strength = ridge(fit, held, truth, (1e-6, 1.0))
    assert strength == float("inf") and torch.equal(solution, truth.float())
    noise = Moments()
    noise.add(z[:4], drawn(4, 3, seed=3) * 100, ones[:4])
    solution, strength = ridge(noise, held, truth + 1e-2, (1e-6,))
    assert strength == float("inf")


def test_refined_values_lower_the_held_back_error() -> None:
    """Two groups of three heads; targets that two shared values can make only with other output weights."""
    mixed, target = drawn(300, 2, 3, 8).float(), drawn(300, HIDDEN, seed=1).float()
    target = target * 0.1 + torch.einsum("xgnm,egnm->xe", mixed, drawn(HIDDEN, 2, 3, 8, seed=2).float())
    rows = [
        fit_values.Mixed(mixed[rows_of], target[rows_of], torch.ones(300)[rows_of])
        for rows_of in (slice(0, 250), slice(250, 300))
    ]
    down, outputs = drawn(2, 4, 8, seed=3).float(), drawn(HIDDEN, 2, 3, 4, seed=4).float()
    refined = fit_values.refine_values(rows[0], rows[1], down, outputs)
    assert fit_values.error_of(rows[1], *refined) < 0.7 * fit_values.error_of(rows[1], down, outputs)
    content = fit_values.Mixed(rows[1].values, 1.01 * fit_values._outputs_of(rows[1], down, outputs), rows[1].weight)
    unchanged = fit_values.refine_values(rows[0], content, down, outputs)
    assert torch.equal(unchanged[0], down) and torch.equal(unchanged[1], outputs), "held-back rows that want what was there"


def test_conjugate_gradients_end_at_the_least_squares() -> None:
    """In as many iterations as there are unknowns, for weighted rows and a bad scale of the output columns."""
    assert fit_values.ITERATIONS == 1 * 2 * 3, "groups x width x old values"
    mixed, target = drawn(40, 1, 2, 3), drawn(40, HIDDEN, seed=1)
    weight, outputs = drawn(40, seed=2).square() + 0.1, drawn(HIDDEN, 1, 2, 2, seed=3)
    outputs[..., 1] *= 10
    rows = fit_values.Mixed(mixed, target, weight)
    start = drawn(1, 2, 3, seed=4)
    columns = [fit_values._outputs_of(rows, unit.reshape(1, 2, 3), outputs).flatten() for unit in torch.eye(6).double()]
    root = weight.sqrt()[:, None].expand(-1, HIDDEN).flatten()
    best = torch.linalg.lstsq(torch.stack(columns, 1) * root[:, None], (target.flatten() * root)[:, None]).solution
    torch.testing.assert_close(fit_values._improve_down(rows, start, outputs), best.reshape(1, 2, 3), rtol=1e-8, atol=1e-8)
