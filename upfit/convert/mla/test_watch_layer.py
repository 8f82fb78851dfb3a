"""Which closed form is the closest: errors of outputs and of scores, and what is decided by which."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from upfit.convert.mla import watch_layer
from upfit.convert.mla.layer import Latent
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.test_mathematics import HEADS as MANY
from upfit.convert.mla.test_mathematics import PAIRS as OF_SOURCE
from upfit.convert.mla.test_mathematics import random_source
from upfit.convert.mla.test_sums import HEADS, KV_HEADS, PAIRS, E, V, drawn, turns, watched
from upfit.convert.mla.watch_layer import Shown, closest, errors

R, PLAIN = 5, 2


def a_latent() -> Latent:
    q, key = drawn(HEADS, 2 * PAIRS + PLAIN, E, seed=20), drawn(2 * PAIRS + R, E, seed=21)
    return Latent(
        q, key, drawn(KV_HEADS, PLAIN, R, seed=22), drawn(KV_HEADS, V, R, seed=23), drawn(E, HEADS, V, seed=24), (0, 1)
    )


def test_errors_are_those_of_plain_loops() -> None:
    """Weights sum to less than one, as with sinks: outputs keep the sum, scores have the variance of what is seen."""
    view, latent, factors = watched()[0], a_latent(), turns()
    targets = [replace(each, scores=drawn(*each.weights.shape, seed=30 + n)) for n, each in enumerate(view.targets)]
    view.targets[:] = targets
    lost, energy, of_scores, of_targets = 0.0, 0.0, 0.0, 0.0
    rotation = factors.q[:, None]

    def turned(heads: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(heads[..., :PAIRS], heads[..., PAIRS : 2 * PAIRS]) * rotation
        return torch.cat([pairs.real, pairs.imag, heads[..., 2 * PAIRS :]], -1)

    for b, x in enumerate(view.inputs):
        cached = x @ latent.key.T
        queries = turned(torch.einsum("te,hde->thd", x, latent.q))
        for target in targets:
            for r, t in enumerate(target.at.tolist()):
                output = wanted = torch.zeros(E, dtype=torch.float64)
                for h in range(HEADS):
                    own, p = h // (HEADS // KV_HEADS), target.weights[b, h, r]
                    plain = cached[:, 2 * PAIRS :] @ latent.up_k[own].T
                    keys = turned(torch.cat([cached[:, : 2 * PAIRS], plain], 1)[:, None])[: target.keys, 0]
                    scores, seen = 0.7 * keys @ queries[t, h], p > 0
                    weights = torch.zeros_like(p)
                    weights[seen] = scores[seen].softmax(0) * p.sum()
                    values = cached[: target.keys, 2 * PAIRS :] @ latent.up_v[own].T
                    output = output + latent.o[:, h] @ (weights @ values)
                    wanted = wanted + latent.o[:, h] @ (p @ view.values[b, : target.keys, own])
                    importance = float(target.importance[b, h, r, 0])
                    for gap, name in ((scores - target.scores[b, h, r], "lost"), (target.scores[b, h, r], "target")):
                        spread = importance * float(p @ (gap - p @ gap).square())
                        of_scores, of_targets = of_scores + spread * (name == "lost"), of_targets + spread * (name == "target")
                lost, energy = lost + float((output - wanted).square().sum()), energy + float(wanted.square().sum())
    assert errors(latent, 0.7, factors, [view]) == pytest.approx((lost / energy, of_scores / of_targets), rel=1e-9)


def test_scores_decide_the_cut_and_outputs_the_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where no key is in the latent, there is no balance to be tried."""
    asked: list[tuple[float, int | None]] = []

    def form(*arguments: Any) -> Any:
        asked.append(arguments[-2:])
        return a_latent()

    def judged(*_: Any) -> tuple[float, float]:
        balance, cut = asked[-1]
        return (0.1 if cut is None else 0.2) - 0.01 * balance, 0.5 if cut == 3 else 0.6

    monkeypatch.setattr(watch_layer, "closed_form", form)
    monkeypatch.setattr(watch_layer, "errors", judged)
    view = watched()[0]
    view.batch.held = True
    shown = Shown([view], random_source(), {}, None, turns())  # type: ignore[arg-type]
    assert OF_SOURCE == 4 and MANY == 6
    chosen = closest(shown, Sizes((1,) * OF_SOURCE, 5, 0), (0.25, 1.0))
    assert chosen.cut == 3 and asked == [(0.25, None), (0.25, 2), (0.25, 3)]
    chosen = closest(shown, Sizes((1,) * OF_SOURCE, 5, 2), (0.25, 1.0))
    assert (chosen.cut, chosen.balance) == (3, 1.0) and asked[-1] == (1.0, 3)
    for counts in ((2,) * OF_SOURCE, (1, 1, 1, 0), ()):
        asked.clear()
        assert closest(shown, Sizes(counts, 5, 2), (0.25,)).cut is None and asked == [(0.25, None)]
