"""Values that a gate or a norm stands behind: exact where that lets a change of basis pass, better than the mean elsewhere."""

import torch
from torch import Tensor

from upfit.calibration import fit_values
from upfit.convert.gqa import closed_form
from upfit.convert.gqa.grouping import pair_costs
from upfit.convert.gqa.test_closed_form import drawn, traits

OLD, PER, WIDTH, ROWS, HIDDEN = 3, 2, 4, 500, 10
HEADS = OLD * PER
OWNERS = torch.arange(OLD).repeat_interleave(PER)


def gated_sums(values: Tensor, gates: Tensor) -> Tensor:
    """[n, V, g, g] of old values [N, g, V] and the query heads' gates [N, n, V]."""
    seen = values[:, None] * gates[:, :, None]
    return torch.einsum("nhiv,nhjv->hvij", seen, seen)


def outputs_of(values: Tensor, gates: Tensor, outputs: Tensor) -> Tensor:
    """[N, E] of values [N, n, V] as each query head has them; `outputs` [n, E, V]."""
    return torch.einsum("nhv,hev->ne", values * gates, outputs)


def merged_outputs(merged: closed_form.ValueMerge, values: Tensor, gates: Tensor, outputs: Tensor) -> Tensor:
    new = values.flatten(1) @ merged.values.T
    return outputs_of(new[:, None].expand(-1, HEADS, -1), gates, outputs @ merged.outputs)


def test_dimensions_that_differ_by_a_factor_merge_exactly_behind_a_gate() -> None:
    base, gates, outputs = drawn(ROWS, WIDTH), drawn(ROWS, HEADS, WIDTH, seed=1).sigmoid(), drawn(HEADS, HIDDEN, WIDTH, seed=2)
    values = base[:, None] * drawn(OLD, WIDTH, seed=3)
    merged = closed_form.merge_gated_values(gated_sums(values, gates), outputs, OWNERS)
    wanted = outputs_of(values[:, OWNERS], gates, outputs)
    torch.testing.assert_close(merged_outputs(merged, values, gates, outputs), wanted, rtol=0, atol=1e-9)
    assert merged.lost < 1e-9


def test_what_a_gated_merge_loses_is_as_told_and_less_than_by_the_mean() -> None:
    """Where the outputs of the dimensions are orthogonal nothing is mixed, and the loss is the sum of theirs."""
    lengths = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None]
    values, gates = drawn(ROWS, OLD, WIDTH) * lengths, drawn(ROWS, HEADS, WIDTH, seed=1).sigmoid()
    basis = torch.linalg.qr(drawn(HEADS * WIDTH, HEADS * WIDTH, seed=2)).Q
    outputs = basis.T.reshape(HEADS, WIDTH, -1).mT
    merged = closed_form.merge_gated_values(gated_sums(values, gates), outputs, OWNERS)
    wanted = outputs_of(values[:, OWNERS], gates, outputs)
    lost = (merged_outputs(merged, values, gates, outputs) - wanted).square().sum()
    by_mean = (outputs_of(values.mean(1, keepdim=True).expand(-1, HEADS, -1), gates, outputs) - wanted).square().sum()
    torch.testing.assert_close(float(lost), merged.lost * merged.power, rtol=1e-6, atol=0)
    torch.testing.assert_close(float(wanted.square().sum()), merged.power, rtol=1e-6, atol=0)
    assert lost < 0.9 * by_mean


def test_heads_that_differ_by_factors_belong_together() -> None:
    """Heads 0 and 3, and 1 and 2, are one but for a factor on each dimension."""
    base, factors = drawn(ROWS, 2, WIDTH), drawn(4, WIDTH, seed=3)
    values, gates = base[:, [0, 1, 1, 0]] * factors, drawn(ROWS, 8, WIDTH, seed=1).sigmoid()
    metric = torch.eye(WIDTH, dtype=torch.float64).expand(4, -1, -1)
    costs = pair_costs(traits(), {"value_dimensions": gated_sums(values, gates)}, metric)
    assert costs[0, 3] < 1e-9 and costs[1, 2] < 1e-9 and costs[0, 1] > 0.01


def test_turned_heads_merge_exactly_behind_a_norm() -> None:
    """What a norm gives out of the merged values is, through the new outputs, what it gave out of the old ones."""
    base = drawn(ROWS, WIDTH)
    base = base / base.square().mean(1, keepdim=True).sqrt()
    turns, outputs = torch.linalg.qr(drawn(OLD, WIDTH, WIDTH, seed=1)).Q, drawn(OLD, HIDDEN, WIDTH, seed=2)
    values = torch.einsum("nv,jwv->njw", base, turns)
    joint = values.flatten(1)
    metric = closed_form.output_metric(outputs, torch.arange(OLD), OLD)
    merged = closed_form.as_rotations(closed_form.merge_values(joint.T @ joint, metric, WIDTH))
    new = joint @ merged.values.T
    torch.testing.assert_close(new.square().mean(1), torch.ones(ROWS, dtype=torch.float64))
    torch.testing.assert_close(torch.einsum("nv,jwv->njw", new, merged.outputs), values)


def test_gates_are_part_of_what_is_fitted() -> None:
    """Of two heads that are one but for a factor on each dimension, alternating least squares come far from their mean."""
    base = drawn(ROWS, HEADS, WIDTH).float()
    values = torch.cat([base, base * drawn(WIDTH, seed=3).float()], -1)[:, None]  # [N, 1, n, 2·V]
    gates = (4 * drawn(ROWS, 1, HEADS, WIDTH, seed=1)).sigmoid().float()
    true = drawn(HIDDEN, HEADS, WIDTH, seed=2).float()
    own = torch.cat([values[:, 0, : HEADS // 2, :WIDTH], values[:, 0, HEADS // 2 :, WIDTH:]], 1)
    target = torch.einsum("nhv,ehv->ne", own * gates[:, 0], true)
    rows = [
        fit_values.Mixed(values[part], target[part], torch.ones(ROWS // 2), gates[part])
        for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
    ]
    mean = torch.eye(WIDTH).repeat(1, 2)[None] / 2, true[:, None]
    assert fit_values.error_of(rows[1], torch.eye(WIDTH, 2 * WIDTH)[None], true[:, None] * _factor(values)) < 1e-3
    refined = fit_values.refine_values(rows[0], rows[1], *mean)
    assert fit_values.error_of(rows[1], *refined) < 0.02 * fit_values.error_of(rows[1], *mean)
    assert fit_values.better_start(rows[1], [mean, refined]) == refined


def test_shared_values_behind_gates_go_to_the_least_squares() -> None:
    """With the outputs held, and a target that no values reach."""
    values, gates = drawn(ROWS, 1, HEADS, 2 * WIDTH), (4 * drawn(ROWS, 1, HEADS, WIDTH, seed=1)).sigmoid()
    outputs, down = drawn(HIDDEN, 1, HEADS, WIDTH, seed=2), torch.zeros(1, WIDTH, 2 * WIDTH, dtype=torch.float64)
    rows = fit_values.Mixed(values, drawn(ROWS, HIDDEN, seed=3), torch.ones(ROWS, dtype=torch.float64), gates)
    basis = torch.eye(down.numel(), dtype=torch.float64).reshape(-1, *down.shape)
    columns = torch.stack([fit_values._outputs_of(rows, each, outputs).flatten() for each in basis], 1)
    best = torch.linalg.lstsq(columns, rows.target.flatten()[:, None]).solution.reshape(down.shape)
    for _ in range(8):
        down = fit_values._improve_down(rows, down, outputs)
    torch.testing.assert_close(down, best, rtol=0, atol=1e-3 * float(best.abs().max()))


def _factor(values: Tensor) -> Tensor:
    """What the columns [E, 1, n, V] of the second head's queries are to be multiplied with for the first one's values."""
    factor = (values[0, 0, 0, WIDTH:] / values[0, 0, 0, :WIDTH]).expand(HEADS, -1).clone()
    factor[: HEADS // 2] = 1
    return factor


def test_outputs_alone_are_fitted_and_exact_ones_left() -> None:
    values, outputs = drawn(ROWS, 1, HEADS, WIDTH).float(), drawn(HIDDEN, 1, HEADS, WIDTH, seed=1).float()
    target = values.flatten(1) @ outputs.flatten(1).T
    fit, held = (
        fit_values.Mixed(values[part], target[part], torch.ones(ROWS // 2))
        for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
    )
    error, same = fit_values.refine_outputs(fit, held, outputs)
    assert same is outputs and error < 1e-6
    start = outputs + 0.3 * drawn(HIDDEN, 1, HEADS, WIDTH, seed=2).float()
    alone = torch.eye(WIDTH)[None]
    error, better = fit_values.refine_outputs(fit, held, start)
    assert error < 0.5 * fit_values.error_of(held, alone, start) and better.shape == start.shape
