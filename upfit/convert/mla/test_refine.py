"""Latents and outputs in turn: each step is least squares, and nothing is taken that what is held back does not like."""

import pytest
import torch
from torch import Tensor

from upfit.convert.mla import refine as room
from upfit.convert.mla.refine import KeyCost, Rows, refine_mixture
from upfit.convert.mla.test_mathematics import drawn

N, HEADS, V, S, R, E = 400, 4, 3, 7, 4, 6
FREE = KeyCost(torch.zeros(R, R).double(), torch.zeros(S, S).double())


def rows_of(down: Tensor, up: Tensor, outputs: Tensor, seed: int, noise: float = 0.0) -> Rows:
    mixed = drawn(N, HEADS, S, seed=seed)
    exact = torch.einsum("nhs,rs,hvr,ehv->ne", mixed, down, up, outputs)
    return Rows(mixed, exact + noise * drawn(N, E, seed=seed + 1), drawn(N, seed=seed + 2).abs() + 0.1)


def a_layer() -> tuple[Tensor, Tensor, Tensor]:
    return drawn(R, S, seed=1), drawn(HEADS, V, R, seed=2), drawn(E, HEADS, V, seed=3)


def key_cost() -> KeyCost:
    metric, moment = drawn(R, R, seed=4), drawn(S, S, seed=5)
    return KeyCost(metric @ metric.T, moment @ moment.T)


def test_the_error_is_that_of_plain_loops() -> None:
    down, up, outputs = a_layer()
    rows, lost = rows_of(down, up, outputs, 10, noise=1.0), 0.0
    other = down + 0.1
    for row in range(N):
        output = sum(outputs[:, head] @ (up[head] @ (other @ rows.mixed[row, head])) for head in range(HEADS))
        lost += float(rows.weight[row] * (output - rows.target[row]).square().sum())
    assert rows.error(other, up, outputs) == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("cost", [FREE, key_cost()], ids=["free", "keys"])
def test_the_latent_is_solved_for(cost: KeyCost, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many iterations as unknowns: where the slope of error and cost together is nothing."""
    monkeypatch.setattr(room, "ITERATIONS", 3 * R * S)
    down, up, outputs = a_layer()
    rows, start = rows_of(down, up, outputs, 10, noise=0.5), down + drawn(R, S, seed=6)
    solved = room._improve_down(rows, start, start, torch.einsum("ehv,hvr->ehr", outputs, up), cost).requires_grad_()
    values = torch.einsum("nhs,rs,hvr,ehv->ne", rows.mixed, solved, up, outputs)
    change = solved - start
    lost = ((values - rows.target).square().sum(1) * rows.weight).sum()
    whole = lost + N * (cost.metric @ change @ cost.moment * change).sum()
    slope = torch.autograd.grad(whole, solved)[0]
    assert float(slope.norm() * solved.detach().norm()) < 1e-6 * float(whole.detach())


def test_a_layer_that_was_disturbed_is_found_again() -> None:
    down, up, outputs = a_layer()
    fit, held = (rows_of(down, up, outputs, seed) for seed in (10, 20))
    start = down + 0.2 * drawn(R, S, seed=6), outputs + 0.1 * drawn(E, HEADS, V, seed=7)
    refined = refine_mixture(fit, held, start[0], up, start[1], FREE)
    assert held.error(refined[0], up, refined[1]) < 0.05 * held.error(start[0], up, start[1])


def test_what_keys_lose_is_counted() -> None:
    """A dear change is not made, nor, however the values would like it, one that costs more than it brings."""
    down, up, outputs = a_layer()
    fit, held = (rows_of(down, up, outputs, seed) for seed in (10, 20))
    start = down + 0.2 * drawn(R, S, seed=6)
    dear = KeyCost(1e6 * torch.eye(R).double(), torch.eye(S).double())
    free, held_by_keys = (refine_mixture(fit, held, start, up, outputs, cost)[0] - start for cost in (FREE, dear))
    assert float(held_by_keys.norm()) < 1e-3 * float(free.norm())


def test_what_is_held_back_decides() -> None:
    """Rows that say something else than the held ones change nothing; nor does anything where nothing is missing."""
    down, up, outputs = a_layer()
    held = rows_of(down, up, outputs, 20, noise=0.01)
    other = rows_of(drawn(R, S, seed=8), up, drawn(E, HEADS, V, seed=9), 10)
    exact = rows_of(down, up, outputs, 20)
    for fit, judge in ((other, held), (other, exact)):
        refined = refine_mixture(fit, judge, down, up, outputs, FREE)
        assert refined[0] is down and refined[1] is outputs
