"""Latents and outputs in turn: each step is least squares, and nothing is taken that what is held back does not like."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upfit.convert.mla import refine as room
from upfit.convert.mla.layer import closed_form, metrics_of
from upfit.convert.mla.refine import KeyCost, Rows, refine_mixture
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.test_mathematics import TOKENS, drawn, predicted, random_source, random_sums
from upfit.convert.mla.test_mathematics import E as SOURCE_E
from upfit.convert.mla.watch_layer import Shown

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
    """With as many iterations as unknowns, from anywhere: where the slope of error and cost together is nothing."""
    monkeypatch.setattr(room, "ITERATIONS", 3 * R * S)
    down, up, outputs = a_layer()
    rows, start = rows_of(down, up, outputs, 10, noise=0.5), down + drawn(R, S, seed=6)
    solved = room._improve_down(
        rows, start + drawn(R, S, seed=7), start, torch.einsum("ehv,hvr->ehr", outputs, up), cost
    ).requires_grad_()
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


def test_mixtures_are_of_all_that_the_text_has() -> None:
    """Uncorrelated, each as large as the others, and every old key and value that goes through the latent is one of them."""
    source = random_source()
    sums = random_sums(source, drawn(TOKENS, SOURCE_E, seed=31))
    shown, sizes = Shown([], source, sums, metrics_of(sums), None), Sizes((1, 1, 1, 1), 8, 2)  # type: ignore[arg-type]
    span, moment = room._span(shown, sizes), sums["inputs"] / sums["tokens"]
    torch.testing.assert_close(span @ moment @ span.T, torch.eye(len(span)).double(), rtol=0, atol=1e-9)
    for row in (source.k[1, 8], source.k[2, 9], source.v[2, 1]):
        torch.testing.assert_close(row @ moment @ span.T @ span, row, rtol=1e-6, atol=1e-6)
    rotated = source.k[0, 0]
    assert float((rotated @ moment @ span.T @ span - rotated).norm()) > 0.1


def test_keys_cost_what_the_closed_form_says() -> None:
    """A row's share of what is predicted of a changed latent, less that of the latent as it is, where that loses no key."""
    source = random_source()
    sums = random_sums(source, drawn(TOKENS, SOURCE_E, seed=31))
    shown = Shown([], source, sums, metrics_of(sums), None)  # type: ignore[arg-type]
    counts, width = (1, 1, 0, 0), 3 * (6 + 5)
    latent = closed_form(source, sums, metrics_of(sums), counts, width, 0.06)
    sizes = Sizes(counts, width, 6)
    span = room._span(shown, sizes)
    change = 0.1 * drawn(width, len(span), seed=3)
    moved = replace(latent, key=torch.cat([latent.key[: latent.rotated], latent.key[latent.rotated :] + change @ span]))
    values = replace(moved, up_v=0 * moved.up_v), replace(latent, up_v=0 * latent.up_v)
    after, before = (float(predicted(source, sums, each, 0.06, rotated=2)) for each in values)
    assert room._key_cost(latent, shown, sizes, span, 0.06).cost(change) == pytest.approx(after - before, rel=1e-6)


def test_what_is_held_back_decides() -> None:
    """Rows that say something else than the held ones change nothing; nor does anything where nothing is missing."""
    down, up, outputs = a_layer()
    held = rows_of(down, up, outputs, 20, noise=0.01)
    other = rows_of(drawn(R, S, seed=8), up, drawn(E, HEADS, V, seed=9), 10)
    exact = rows_of(down, up, outputs, 20)
    for fit, judge in ((other, held), (other, exact)):
        refined = refine_mixture(fit, judge, down, up, outputs, FREE)
        assert refined[0] is down and refined[1] is outputs
