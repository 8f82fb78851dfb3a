"""Latents and outputs in turn: each step is least squares, and nothing is taken that what is held back does not like."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from upfit.calibration.scores.fit import Penalty
from upfit.convert.mla import refine as room
from upfit.convert.mla.layer import closed_form, metrics_of
from upfit.convert.mla.refine import Rows, refine_mixture
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.test_mathematics import TOKENS, drawn, predicted, random_source, random_sums
from upfit.convert.mla.test_mathematics import E as SOURCE_E
from upfit.convert.mla.test_sums import TRAITS, turns, watched
from upfit.convert.mla.test_watch_layer import a_latent
from upfit.convert.mla.watch_layer import Shown

N, HEADS, V, S, R, E = 400, 4, 3, 7, 4, 6
rows_of_views = room._rows


def held_rows(*arguments: Any) -> Rows:
    """Of what is held back, whatever is asked for."""
    return rows_of_views(*[*arguments[:-1], True])


FREE = Penalty(torch.zeros(R, R).double(), torch.zeros(S, S).double())


def rows_of(down: Tensor, up: Tensor, outputs: Tensor, seed: int, noise: float = 0.0) -> Rows:
    mixed = drawn(N, HEADS, S, seed=seed)
    exact = torch.einsum("nhs,rs,hvr,ehv->ne", mixed, down, up, outputs)
    return Rows(mixed, exact + noise * drawn(N, E, seed=seed + 1), drawn(N, seed=seed + 2).abs() + 0.1)


def a_layer() -> tuple[Tensor, Tensor, Tensor]:
    return drawn(R, S, seed=1), drawn(HEADS, V, R, seed=2), drawn(E, HEADS, V, seed=3)


def key_cost() -> Penalty:
    metric, moment = drawn(R, R, seed=4), drawn(S, S, seed=5)
    return Penalty(metric @ metric.T, moment @ moment.T)


def test_the_error_is_that_of_plain_loops() -> None:
    down, up, outputs = a_layer()
    rows, lost = rows_of(down, up, outputs, 10, noise=1.0), 0.0
    other = down + 0.1
    for row in range(N):
        output = sum(outputs[:, head] @ (up[head] @ (other @ rows.mixed[row, head])) for head in range(HEADS))
        lost += float(rows.weight[row] * (output - rows.target[row]).square().sum())
    assert rows.error(other, up, outputs) == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("cost", [FREE, key_cost()], ids=["free", "keys"])
def test_the_latent_is_solved_for(cost: Penalty, monkeypatch: pytest.MonkeyPatch) -> None:
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
    dear = Penalty(1e6 * torch.eye(R).double(), torch.eye(S).double())
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


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_mixture_is_no_worse_than_the_latent_that_it_replaces(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have a part that is no mixture of old keys and values, and that only the latent itself knows."""
    view, latent = watched()[0], a_latent()
    view.batch.held = True
    inputs = torch.einsum("bte,btf->ef", view.inputs, view.inputs)
    shown = Shown([view], random_source(), {"inputs": inputs, "tokens": torch.tensor(1.0)}, None, turns())  # type: ignore[arg-type]
    monkeypatch.setattr(room, "_span", lambda *_: torch.linalg.inv(torch.linalg.cholesky(inputs)))  # of all inputs
    monkeypatch.setattr(room, "_key_cost", lambda *_: FREE)
    better = view.batch.teacher.new_zeros(())

    def refined(fit: Rows, held: Rows, start: Tensor, up: Tensor, outputs: Tensor, keys: Penalty) -> tuple[Tensor, Tensor]:
        nonlocal better
        better = torch.linalg.lstsq(held.values(start, up), held.target).solution.T.unflatten(1, outputs.shape[1:])
        return start.clone(), (better if factor == 1.0 else outputs + factor * (outputs - better))

    monkeypatch.setattr(room, "refine_mixture", refined)
    monkeypatch.setattr(room, "_rows", held_rows)
    after = room.refine(latent, shown, TRAITS, Sizes((), R, 2), 1.0, 0.0)
    if factor != 1.0:
        assert after is latent
        return
    assert torch.equal(after.o, better) and torch.equal(after.key[:4], latent.key[:4])
    torch.testing.assert_close(after.key, latent.key, rtol=1e-8, atol=1e-8)
