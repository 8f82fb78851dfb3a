"""What a merge is best in, against references that know nothing of how it is found: singular values of what the heads give out.

By Eckart and Young no shared head of width V can give out more than the V largest singular values of what the old ones gave.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from upfit.architecture.attention import Attention
from upfit.calibration import fit_values
from upfit.calibration.observe import Seen
from upfit.calibration.reduction import powers
from upfit.calibration.scores.problem import Target
from upfit.calibration.statistics import Rows
from upfit.calibration.teacher_student import PairedBatch
from upfit.calibration.teacher_view import View, _spread, _target
from upfit.convert.gqa import closed_form
from upfit.convert.gqa.grouping import pair_costs
from upfit.convert.gqa.layer_state import LayerRecord, Merged
from upfit.convert.gqa.merge_layer import CUTS, _cuts, choose_groups, merge_layer, refine
from upfit.convert.gqa.test_closed_form import FREE, OLD, PAIRS, WIDTH, drawn, moments, traits

VALUE, HIDDEN, SAMPLES = 4, 12, 60
LOUDNESS = (0.01, 1.0, 30.0)  # of the heads' queries or outputs: far from equal, so that weights matter


def tail(matrix: Tensor, rank: int) -> Tensor:
    """The least squared error of any matrix of `rank`."""
    return torch.linalg.svdvals(matrix)[rank:].square().sum()


def test_shared_values_lose_least_of_what_is_given_out() -> None:
    """Of the output, not of the values: a head that o_proj makes loud counts for more."""
    loud = torch.tensor(LOUDNESS, dtype=torch.float64)
    v, o = drawn(OLD, VALUE, HIDDEN), drawn(HIDDEN, OLD, VALUE, seed=1) * loud[:, None]
    q, k = drawn(OLD, WIDTH, HIDDEN, seed=2), drawn(OLD, WIDTH, HIDDEN, seed=3)
    x = drawn(SAMPLES, HIDDEN, seed=4)
    before = torch.einsum("xe,jve->xjv", x, v)
    outs = torch.einsum("xjv,ejv->xje", before, o)
    sums = {"values": before.flatten(1).T @ before.flatten(1)}
    [merged] = merge_layer(replace(traits(), keys=False), Attention(q=q, k=k, v=v, o=o), sums, 1, LayerRecord("")).values()
    after = torch.einsum("xv,ejv->xje", x @ merged.v[0].double().T, merged.o.double())
    lost, least = (outs - after).square().sum(), tail(outs.flatten(1), VALUE)
    torch.testing.assert_close(lost, least, rtol=1e-4, atol=0)


@pytest.mark.parametrize("cut", [PAIRS, 0])
def test_shared_keys_lose_least_where_queries_are_loud(cut: int) -> None:
    """Each old head's keys count by the energy of its queries: on a rotated pair the best shared key is that of one complex
    number for all heads, on the others (cut 0: on all) that of as many real ones as there are places."""
    keys = [drawn(SAMPLES, WIDTH, seed=j) for j in range(OLD)]
    queries = [drawn(SAMPLES, WIDTH, seed=20 + j) * loud for j, loud in enumerate(LOUDNESS)]
    joint, pairs, of_queries, owners = moments(keys, queries)
    merged = closed_form.merge_keys(traits(), joint, pairs, of_queries, owners, cut)
    shared = torch.cat(keys, 1) @ merged.keys.T
    gaps = [own - shared @ turn for own, turn in zip(keys, merged.queries, strict=True)]
    if cut:
        complex_keys = [torch.complex(own[:, :PAIRS], own[:, PAIRS : 2 * PAIRS]) for own in keys]
        for pair in range(PAIRS):
            both = [pair, PAIRS + pair]
            energy = torch.stack([query[:, both].square().sum() for query in queries])
            lost = sum(e * gap[:, both].square().sum() for e, gap in zip(energy, gaps, strict=True))
            seen = torch.stack([own[:, pair] for own in complex_keys], 1) * energy.sqrt()
            torch.testing.assert_close(lost, tail(seen, 1), rtol=1e-3, atol=0)
        gaps, keys = ([one[:, -FREE:] for one in tensors] for tensors in (gaps, keys))
        queries = [query[:, -FREE:] for query in queries]
    roots = [powers(query.T @ query)[0] for query in queries]
    lost = sum((gap @ root).square().sum() for gap, root in zip(gaps, roots, strict=True))
    least = tail(torch.cat([own @ root for own, root in zip(keys, roots, strict=True)], 1), len(roots[0]))
    torch.testing.assert_close(lost, least, rtol=1e-3, atol=0)


def statistics(keys: list[Tensor], values: list[Tensor], queries: list[Tensor]) -> dict[str, Tensor]:
    joint, pairs, of_queries, _ = moments(keys, queries)
    mixed = torch.cat(values, 1)
    sums = {"keys": joint, "key_pairs": torch.view_as_real(pairs.contiguous()), "queries": of_queries}
    return sums | {"values": mixed.T @ mixed}


def test_the_cost_of_two_heads_is_what_their_merge_loses() -> None:
    keys, values = ([drawn(SAMPLES, width, seed=j) for j in range(OLD)] for width in (WIDTH, VALUE))
    queries = [drawn(SAMPLES, WIDTH, seed=20 + h) * LOUDNESS[h // 2] for h in range(2 * OLD)]
    outputs = drawn(HIDDEN, OLD, VALUE, seed=9) * torch.tensor(LOUDNESS, dtype=torch.float64)[:, None]
    sums = statistics(keys, values, queries)
    metric = torch.stack([closed_form.output_gram(outputs, [j]) for j in range(OLD)])
    costs = pair_costs(traits(), sums, metric)
    turned = [torch.complex(own[:, :PAIRS], own[:, PAIRS : 2 * PAIRS]) for own in keys]
    energy = [query[:, :PAIRS].square().sum(0) + query[:, PAIRS : 2 * PAIRS].square().sum(0) for query in queries]
    loud = torch.stack(energy).sum(0)  # [P]
    outs = [own @ outputs[:, j].T for j, own in enumerate(values)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        lost = sum(e * tail(torch.stack([turned[a][:, p], turned[b][:, p]], 1), 1) for p, e in enumerate(loud))
        of_keys = lost / sum(e * own[:, p].abs().square().sum() for own in turned for p, e in enumerate(loud))
        of_values = tail(torch.cat([outs[a], outs[b]], 1), VALUE) / sum(one.square().sum() for one in outs)
        torch.testing.assert_close(costs[a, b], of_keys + of_values, rtol=1e-5, atol=1e-9)
        assert costs[a, b] == costs[b, a]


def test_queries_that_never_go_somewhere_cost_nothing_there() -> None:
    """Free keys under queries of rank one: finite costs, and none where two heads have the same keys."""
    keys, query = drawn(SAMPLES, WIDTH, seed=1), drawn(WIDTH, 1, seed=2)
    other = drawn(SAMPLES, WIDTH, seed=3)
    joint = torch.cat([keys, keys, other], 1)
    loud = torch.tensor([1.0, 1.0, 1e-12], dtype=torch.float64)[:, None, None]
    sums = {"keys": joint.T @ joint, "queries": loud * (query @ query.T) - 1e-15 * torch.eye(WIDTH)}  # as rounding leaves it
    costs = pair_costs(replace(traits(), pairs=0), sums, torch.zeros(OLD, VALUE, VALUE).double())
    assert costs.isfinite().all() and 0 <= costs[0, 1] < 1e-6


@pytest.mark.parametrize("missing", ["key_pairs", "queries", "factors", "everything of keys"])
@pytest.mark.parametrize("pairs", [PAIRS, 0])
def test_keys_of_which_too_little_is_known_do_not_count(missing: str, pairs: int) -> None:
    """Values are compared all the same, and so are keys that are not turned, which no pairs are needed for."""
    keys, values = ([drawn(SAMPLES, width, seed=j) for j in range(OLD)] for width in (WIDTH, VALUE))
    sums = statistics(keys, values, [drawn(SAMPLES, WIDTH, seed=20 + h) for h in range(2 * OLD)])
    metric = torch.eye(VALUE, dtype=torch.float64).expand(OLD, -1, -1)
    kind = replace(traits(), pairs=pairs, factors=missing != "factors")
    alone = pair_costs(kind, {"values": sums["values"]}, metric)
    lost = ("keys", "key_pairs", "queries") if missing == "everything of keys" else (missing,)
    if not pairs and "queries" in lost and "keys" not in lost:
        return  # queries and keys are summed together
    costs = pair_costs(kind, {name: total for name, total in sums.items() if name not in lost}, metric)
    assert torch.equal(costs, alone) == (pairs > 0 or missing != "key_pairs")


@pytest.mark.parametrize("alike", ["keys", "values"])
def test_heads_that_are_alike_share_a_new_one(alike: str) -> None:
    """Heads 0 and 2 in one group and 1 and 3 in the other, by what their keys or their values have in common."""
    twins = (0, 1, 0, 1)
    keys = [drawn(SAMPLES, WIDTH, seed=twins[j] if alike == "keys" else j) for j in range(4)]
    values = [drawn(SAMPLES, VALUE, seed=40 + (twins[j] if alike == "values" else j)) for j in range(4)]
    sums = statistics(keys, values, [drawn(SAMPLES, WIDTH, seed=20 + h) for h in range(8)])
    outputs = drawn(HIDDEN, 8, VALUE, seed=9)
    assert choose_groups(traits(), sums, outputs, 4, 2) == [[0, 2], [1, 3]]


def test_rows_are_fitted_as_they_matter() -> None:
    """In proportion to what their scores can do to the output, and to the weight of their token; 1 in the mean."""
    heads, tokens, v = 4, 5, drawn(2, 2, 5, VALUE, seed=1)
    seen = Seen(nn.Identity(), drawn(2, heads, tokens, WIDTH), drawn(2, 2, tokens, WIDTH, seed=3), v, None, 0.5, None, None, v)
    outputs, of_tokens = drawn(HIDDEN, heads, VALUE, seed=4), drawn(2, tokens, seed=5).abs() + 0.1
    at = torch.tensor([1, 4])
    rows = Rows(at, tokens)
    importance = _target(seen, rows, outputs, of_tokens, 1.0).importance
    wanted = _spread(seen, seen.scores(at, tokens)[1], tokens, outputs) * of_tokens[:, at][:, None, :, None]
    torch.testing.assert_close(importance, wanted / wanted.mean(), rtol=1e-3, atol=1e-3)
    assert float(importance.max()) > 2 * float(importance.min()), "they are not all alike"
    halved = _target(seen, rows, outputs, of_tokens, 0.5).importance
    torch.testing.assert_close(halved, importance.sqrt() / importance.sqrt().mean(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(halved.mean(), torch.ones((), dtype=halved.dtype))
    alike = _target(seen, rows, outputs, of_tokens, 0.0).importance
    assert torch.equal(alike, torch.ones_like(alike))


TOKENS = 40
DOWN, OUTPUTS = drawn(1, VALUE, OLD * VALUE, seed=3), drawn(HIDDEN, OLD, VALUE, seed=9)


def view_of(held: bool, seed: int, merged: bool = False) -> View:
    """What query heads with a key/value head each give out, at every position; `merged`: what they give with DOWN instead."""
    values, weights = drawn(1, TOKENS, OLD, VALUE, seed=seed), drawn(1, OLD, TOKENS, TOKENS, seed=seed + 1).softmax(-1)
    attended = torch.einsum("bhrl,blhv,ehv->bre", weights, values, OUTPUTS)
    if merged:
        attended = torch.einsum("bhrl,blm,vm,ehv->bre", weights, values.flatten(2), DOWN[0], OUTPUTS)
    target = Target(torch.arange(TOKENS), TOKENS, weights, weights, weights[..., :1])
    batch = PairedBatch(held, [], [], attended, attended, TOKENS)
    stream: dict[str, Any] = dict.fromkeys(("inputs", "key_inputs", "before", "attended", "total", "output"), attended)
    return View(batch, **stream, values=values, scaling=1.0, targets=[target])


def refined(*views: View) -> tuple[Tensor, Tensor]:
    """Shared values and outputs after one round from DOWN and OUTPUTS."""
    v = drawn(OLD, VALUE, HIDDEN)
    merged = Merged(OUTPUTS, v, DOWN @ v.flatten(0, 1), OUTPUTS, DOWN, list(range(OLD)), [list(range(OLD))], 1.0)
    refine(traits(), Attention(v=v, o=OUTPUTS), merged, list(views), 0.0)
    return merged.v, merged.o


def test_values_are_fitted_on_fitted_rows_and_taken_for_held_back_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other held-back rows the same comes out, with other fitted ones something else; where held-back rows want what was
    there before, it stays."""
    monkeypatch.setattr(fit_values, "ROUNDS", 1)
    result = refined(view_of(False, 10), view_of(True, 30))
    assert all(map(torch.equal, result, refined(view_of(False, 10), view_of(True, 40))))
    assert not any(map(torch.equal, result, refined(view_of(False, 20), view_of(True, 30))))
    assert not torch.equal(result[1], OUTPUTS)
    content = refined(view_of(False, 10), view_of(True, 30, merged=True))
    assert torch.equal(content[1], OUTPUTS)


def test_cuts_are_searched_only_where_nothing_comes_after_the_keys() -> None:
    """Behind a norm whose scales agree on pairs, keys are merged as whole pairs; where they do not, means are tried too."""
    assert _cuts(traits()) == sorted({round(share * PAIRS) for share in CUTS}) and len(_cuts(traits())) > 1
    assert _cuts(traits(normed=True)) == [PAIRS]
    assert _cuts(traits(normed=True, factors=False)) == [closed_form.AVERAGED, PAIRS]
    assert _cuts(replace(traits(), pairs=0)) == [0] and _cuts(replace(traits(), keys=False)) == [PAIRS]
