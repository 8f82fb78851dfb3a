"""What is summed up of a layer, against plain loops; what becomes of norms, of biases, and of cosines; what a change costs."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from upfit.architecture.attention import Attention
from upfit.calibration.observe import Call, Opaque, Seen
from upfit.calibration.scores.fit import Penalty
from upfit.calibration.scores.problem import Target
from upfit.calibration.statistics import add
from upfit.calibration.teacher_student import PairedBatch
from upfit.calibration.teacher_view import View
from upfit.calibration.traits import AttentionTraits, Turns
from upfit.convert.mla.convert_layers import rotation_columns
from upfit.convert.mla.linear import projections, scale_sums, scaled
from upfit.convert.mla.sums import observe, still
from upfit.convert.mla.test_mathematics import drawn

BATCH, TOKENS, HEADS, KV_HEADS, PAIRS, WIDTH, V, E = 3, 8, 4, 2, 2, 6, 3, 5
ORDER = (4, 0, 5, 2, 1, 3)
TRAITS = AttentionTraits(True, True, False, True, True, PAIRS, ORDER, (1.0, 0.3), None)
ROWS = (([1, 3], 5), ([5, 7], 8))  # of two targets: query positions, and how many keys they look at


def turns(scale: float = 1.0) -> Turns:
    angles = torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.3])
    factors = torch.polar(torch.full_like(angles, scale), angles).to(torch.complex128)
    return Turns(factors, factors)


def turned(heads: Tensor, factors: Tensor) -> Tensor:
    """[B, T, heads, D] with each pair times its factor at its position, and the dimensions where the family has them."""
    pairs = torch.complex(heads[..., :PAIRS], heads[..., PAIRS : 2 * PAIRS]) * factors[:, None]
    ordered = torch.cat([pairs.real, pairs.imag, heads[..., 2 * PAIRS :]], -1)
    return torch.zeros_like(ordered).index_copy(-1, torch.tensor(ORDER), ordered)


def targets(seed: int = 0) -> list[Target]:
    """Weights that sum to less than one, as with sinks; `unit` differs."""
    made = []
    for number, (rows, keys) in enumerate(ROWS):
        at = torch.tensor(rows)
        weights = drawn(BATCH, HEADS, len(rows), keys, seed=seed + number)
        weights = 0.9 * weights.masked_fill(torch.arange(keys) > at[:, None], float("-inf")).softmax(-1)
        importance = drawn(BATCH, HEADS, len(rows), 1, seed=seed + 7).abs()
        made.append(Target(at, keys, torch.zeros_like(weights), weights, importance, unit=0.5 + number))
    return made


def watched(counted: Tensor | None = None, scale: float = 1.0) -> tuple[View, Seen, Tensor, Tensor]:
    """A view, what was seen, and queries and keys [B, T, heads, D] in order before their rotation. Rows of padding have no
    importance, as those of `watch_teacher`."""
    inputs, stream, attended = drawn(BATCH, TOKENS, E), drawn(BATCH, TOKENS, E, seed=1), drawn(BATCH, TOKENS, E, seed=2)
    q, k = (drawn(BATCH, TOKENS, heads, WIDTH, seed=heads) for heads in (HEADS, KV_HEADS))
    rows = targets()
    if counted is not None:
        rows = [replace(row, importance=row.importance * counted[:, None, row.at, None]) for row in rows]
    batch = PairedBatch(False, [], [], stream, stream, TOKENS, counted)
    values = drawn(BATCH, TOKENS, KV_HEADS, V, seed=3)
    view = View(batch, inputs, inputs, stream, attended, stream, stream, values, 1.0, rows)
    q_seen, k_seen = (turned(heads, turns(scale).q).transpose(1, 2) for heads in (q, k))
    return view, Seen(torch.nn.Identity(), q_seen, k_seen, values.transpose(1, 2), None, 1.0, None, None, attended), q, k


def by_loops(view: View, q: Tensor, k: Tensor, factors: Tensor, width: int) -> dict[str, Tensor]:
    x = view.inputs if width == E else torch.cat([view.inputs, torch.ones(BATCH, TOKENS, 1).double()], -1)
    shapes = {"queries": (HEADS, WIDTH, WIDTH), "keys": (width, width), "values": (width, width), "inputs": (width, width)}
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    sums |= {"share": torch.zeros(HEADS).double(), "tokens": torch.zeros(()).double(), "rows": torch.zeros(()).double()}
    sums["pairs"] = torch.zeros(HEADS, PAIRS, KV_HEADS, KV_HEADS, dtype=torch.complex128)
    real = torch.ones(BATCH, TOKENS).bool() if view.batch.counted is None else view.batch.counted
    for b, t in real.nonzero().tolist():
        sums["inputs"] += torch.outer(x[b, t], x[b, t])
        sums["tokens"] += 1
    for target in view.targets:
        for (b, r), t in (((b, r), t) for b in range(BATCH) for r, t in enumerate(target.at.tolist()) if real[b, t]):
            sums["rows"] += 1
            for h in range(HEADS):
                p, importance = target.weights[b, h, r], target.importance[b, h, r, 0] * target.unit
                looked = x[b, : target.keys]
                mean = p @ looked
                moment = importance * (looked.T @ (p[:, None] * looked) - torch.outer(mean, mean))
                sums["keys"] += moment
                sums["share"][h] += moment.trace()
                sums["values"] += torch.outer(mean, mean) / view.batch.teacher[b, t].square().mean()
                sums["queries"][h] += torch.outer(q[b, t, h], q[b, t, h])
                for pair in range(PAIRS):
                    keys = torch.complex(k[b, : target.keys, :, pair], k[b, : target.keys, :, PAIRS + pair])
                    keys = keys * factors[: target.keys, pair, None]  # [L, K]
                    middle = p.to(keys) @ keys
                    sums["pairs"][h, pair] += importance * (
                        torch.einsum("l,li,lj->ij", p.to(keys), keys, keys.conj()) - torch.outer(middle, middle.conj())
                    )
    return sums


def padding() -> Tensor:
    counted = torch.ones(BATCH, TOKENS).bool()
    counted[0, 4:] = counted[2, 6:] = False
    return counted


@pytest.mark.parametrize("width", [E, E + 1])
@pytest.mark.parametrize("counted", [None, padding()], ids=["all", "padded"])
def test_sums_are_those_of_plain_loops(width: int, counted: Tensor | None) -> None:
    view, seen, q, k = watched(counted)
    ours, expected = observe(view, seen, TRAITS, turns(), width), by_loops(view, q, k, turns().k, width)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(ours["share"].sum(), ours["keys"].trace())


def test_sums_of_batches_add_up() -> None:
    view, seen, *_ = watched(padding())
    whole, parts = observe(view, seen, TRAITS, turns(), E), dict[str, Tensor]()
    for b in range(BATCH):
        stream, one = view.batch.teacher[b : b + 1], slice(b, b + 1)
        rows = [replace(row, weights=row.weights[one], importance=row.importance[one]) for row in view.targets]
        batch = PairedBatch(False, [], [], stream, stream, TOKENS, padding()[one])
        streams = (view.inputs[one], view.inputs[one], stream, view.attended[one], stream, stream, view.values[one])
        alone = replace(seen, q=seen.q[one], k=seen.k[one], v=seen.v[one])
        add(parts, observe(View(batch, *streams, 1.0, rows), alone, TRAITS, turns(), E))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=name)


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_queries_are_turned_back(scale: float) -> None:
    """By the rotation and the scale that a family gives it."""
    _, seen, q, _ = watched(scale=scale)
    torch.testing.assert_close(still(seen.q[..., list(ORDER)].transpose(1, 2), turns(scale).q), q)
    assert still(q, turns().q[:, :0]) is q


def test_rows_are_scaled_to_what_norms_made_of_them() -> None:
    """Where the attention is given each row of q and k times a number, that number; else the least squares."""
    view, seen, *_ = watched()
    q, k = drawn(HEADS, WIDTH, E), drawn(KV_HEADS, WIDTH, E, seed=1)
    by_q, by_k = drawn(HEADS, WIDTH, 1, seed=2), drawn(KV_HEADS, WIDTH, 1, seed=3)
    linear = [torch.einsum("bte,hde->bthd", view.inputs, weight) for weight in (by_q * q, by_k * k)]
    q_seen, k_seen = (turned(heads, turns().q).transpose(1, 2) for heads in linear)
    exact = replace(seen, q=q_seen, k=k_seen)
    sums = scale_sums(view, exact, TRAITS, turns(), q, k)
    torch.testing.assert_close(scaled(q, sums["scale_q"]), by_q * q)
    torch.testing.assert_close(scaled(k, sums["scale_k"]), by_k * k)
    sums = scale_sums(view, seen, TRAITS, turns(), q, k)
    wanted, ours = still(seen.q[..., list(ORDER)].transpose(1, 2), turns().q), scaled(q, sums["scale_q"])
    for h, d in ((0, 0), (3, 5)):
        column = (view.inputs @ q[h, d]).flatten()[:, None]
        factor = torch.linalg.lstsq(column, wanted[:, :, h, d].flatten()[:, None]).solution
        torch.testing.assert_close(ours[h, d], factor[0] * q[h, d])
    silent = scaled(torch.zeros_like(q), torch.zeros(2, HEADS, WIDTH).double())
    assert torch.equal(silent, torch.zeros_like(q))


@pytest.mark.parametrize("biased", ["", "q", "v", "qkv"])
def test_biases_are_what_a_one_is_multiplied_with(biased: str) -> None:
    shapes = {"q": (HEADS, WIDTH), "k": (KV_HEADS, WIDTH), "v": (KV_HEADS, V)}
    weights: dict[str, Any] = {name: drawn(*shape, E, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    biases: dict[str, Any] = {f"{name}_bias": drawn(*shapes[name], seed=9) for name in biased}
    parts, x = projections(Attention(**weights, **biases), list(ORDER)), drawn(7, E, seed=4)
    inputs = torch.cat([x, torch.ones(7, 1).double()], 1) if biased else x
    for (name, shape), ours in zip(shapes.items(), parts, strict=True):
        expected = torch.einsum("hde,xe->xhd", weights[name], x) + biases.get(f"{name}_bias", torch.zeros(shape).double())
        expected = expected if name == "v" else expected[..., list(ORDER)]
        torch.testing.assert_close(torch.einsum("hde,xe->xhd", ours, inputs), expected)


def given_a_layer(angles: Tensor, scale: float = 1.0) -> Call:
    """A call with cosines and sines [B, T, columns] of `angles` [T, columns] among its arguments."""
    cos, sin = ((scale * part)[None].float() for part in (angles.cos(), angles.sin()))
    return Call((), {"attention_mask": None, "position_ids": torch.arange(TOKENS)[None], "position_embeddings": (cos, sin)})


def test_columns_are_those_by_which_keys_turn() -> None:
    """Halves, neighbours, and halves out of order, scaled too; the cosines may be of fewer positions than the turns."""
    speeds = torch.tensor([1.0, 0.3, 0.05, 0.9]).double()
    angles = torch.arange(TOKENS)[:, None] * speeds
    fastest = speeds.argsort(descending=True)
    factors = torch.polar(torch.full_like(angles, 1.3), angles)[:, fastest]
    halves, neighbours = torch.cat([angles, angles], 1), angles.repeat_interleave(2, 1)
    for layout, expected in ((halves, [0, 3, 1, 2]), (neighbours, [0, 6, 2, 4])):
        assert rotation_columns(given_a_layer(layout, 1.3), Turns(factors, factors)) == expected
        assert rotation_columns(given_a_layer(layout[:5], 1.3), Turns(factors, factors)) == expected
        positional = Call((*given_a_layer(layout, 1.3).keywords.values(),), {})
        assert rotation_columns(positional, Turns(factors, factors)) == expected
    assert rotation_columns(Call((), {}), Turns(factors[:, :0], factors[:, :0])) == []
    backwards = torch.cat([-angles, -angles], 1)
    for call in (given_a_layer(halves[:, :3], 1.3), given_a_layer(halves), given_a_layer(backwards, 1.3), Call((), {})):
        with pytest.raises(Opaque, match="not given cosines and sines by which its keys turn"):
            rotation_columns(call, Turns(factors, factors))


def a_penalty() -> tuple[Penalty, Tensor]:
    metric, moment = drawn(4, 4, seed=1), drawn(9, E, seed=2)
    return Penalty(metric @ metric.T, moment.T @ moment), drawn(4, E, seed=3)


def test_a_penalty_pulls_by_half_the_slope_of_its_cost() -> None:
    penalty, change = a_penalty()
    free = change.clone().requires_grad_()
    cost = (penalty.metric @ free @ penalty.moment @ free.T).trace()
    assert penalty.cost(change) == pytest.approx(float(cost.detach()))
    torch.testing.assert_close(penalty.pull(change), torch.autograd.grad(cost, free)[0] / 2)


def test_a_penalty_of_whitened_inputs_costs_the_same() -> None:
    penalty, change = a_penalty()
    basis = torch.linalg.cholesky(torch.cov(drawn(E, 40, seed=5)) + 0.1 * torch.eye(E).double())
    assert penalty.whitened(basis).cost(change @ basis) == pytest.approx(penalty.cost(change))
    torch.testing.assert_close(penalty.whitened(basis).pull(change @ basis) @ basis.T, penalty.pull(change))


def test_layers_alike_have_a_penalty_of_values_alone() -> None:
    """Rotated keys pay nothing; a change of the latent pays Σ_h |O_h U_V Δ x̄|² over the stream's energy, in units of scores."""
    from upfit.convert.mla.convert_layers import _penalty
    from upfit.convert.mla.layer import Latent

    view, seen, *_ = watched()
    rank = 2
    latent = Latent(
        drawn(HEADS, 2 * PAIRS, E), drawn(2 * PAIRS + rank, E), drawn(KV_HEADS, 0, rank), drawn(KV_HEADS, V, rank),
        drawn(E, HEADS, V), tuple(range(PAIRS)),
    )  # fmt: skip
    sums = observe(view, seen, TRAITS, turns(), E)
    shown: Any = SimpleNamespace(views=[view], sums=sums)
    penalty, change = _penalty(latent, shown), drawn(2 * PAIRS + rank, E, seed=11)
    unit, expected = (0.5 + 1.5) / 2, 0.0
    for head in range(HEADS):
        moved = latent.o[:, head] @ latent.up_v[head // 2] @ change[2 * PAIRS :]
        expected += float((moved @ sums["values"] @ moved.T).trace()) / HEADS / unit
    assert penalty.cost(change) == pytest.approx(expected)
