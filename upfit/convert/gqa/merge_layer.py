"""Merges the heads of one layer in closed form from its statistics, then improves the merge on the teacher's sampled rows."""

from dataclasses import replace

import torch
from torch import Tensor

from upfit.architecture.attention import LAYOUTS, Attention, Layer
from upfit.calibration import fit_values
from upfit.calibration.between import OF_DIMENSIONS
from upfit.calibration.products import rounded
from upfit.calibration.reduction import TINY
from upfit.calibration.ridge import augmented
from upfit.calibration.rotation import unit_norm
from upfit.calibration.teacher_view import View
from upfit.calibration.traits import AttentionTraits
from upfit.convert.gqa import closed_form
from upfit.convert.gqa.grouping import head_order, pair_costs, partition
from upfit.convert.gqa.layer_state import LayerRecord, Merged, with_bias
from upfit.convert.gqa.pooling import mean

CUTS = (0.4, 0.5, 0.6, 0.75, 1.0)  # shares of the rotated pairs, from the fastest, that are merged as rotated


def merge_layer(
    traits: AttentionTraits, attention: Attention, sums: dict[str, Tensor], kv_heads: int, record: LayerRecord
) -> dict[int, Merged]:
    """The closed-form merges, one for each cut of slow pairs that is to be tried; all share their values and outputs."""
    assert attention.q is not None and attention.k is not None and attention.v is not None and attention.o is not None
    q = with_bias(attention.q, attention.q_bias).double()
    k = with_bias(attention.k, attention.k_bias).double()
    v = with_bias(attention.v, attention.v_bias).double()
    o = attention.o.double()
    count, heads = k.shape[0], o.shape[1]
    groups = choose_groups(traits, sums, o, count, kv_heads)
    record.groups = groups
    per, size = heads // count, heads // kv_heads
    order = head_order(groups, per)
    new_v, downs, new_o, lost = [], [], o[:, order].clone(), 0.0
    for r, group in enumerate(groups):
        if not traits.values:
            new_v.append(v[group].mean(0))
            lost = max(lost, _unlike(v[group]))
            downs.append(torch.empty(0, 0, dtype=v.dtype))
            continue
        own = slice(r * size, (r + 1) * size)
        merged = merge_group_values(sums, new_o[:, own], group, per)
        lost = max(lost, merged.lost)
        old = v[group]
        if traits.value_unit:
            merged, old = closed_form.as_rotations(merged), _one_length(old)
        downs.append(merged.values)
        new_v.append(merged.values @ old.flatten(0, 1))
        new_o[:, own] = torch.einsum("hev,hvw->ehw", new_o[:, own].transpose(0, 1), merged.outputs)
    values, outputs, down = torch.stack(new_v).float(), new_o.float(), torch.stack(downs).float()
    result: dict[int, Merged] = {}
    one_length = traits.normed and (attention.k_norm is None or attention.k_norm.ndim == 1)
    for cut in _cuts(traits):
        new_q, new_k, lost_keys = _merge_keys(traits, q, k, sums, groups, per, cut, one_length)
        result[cut] = Merged(new_q.float(), new_k.float(), values, outputs, down, order, groups, max(lost, lost_keys))
    return result


def _unlike(heads: Tensor) -> float:
    """What the mean of `heads` [g, D, E'] loses, as a share of their energy."""
    return float((heads - heads.mean(0)).square().sum() / heads.square().sum().clamp_min(TINY))


def _one_length(heads: Tensor) -> Tensor:
    """`heads` [g, D, E'] as long as their mean length, which a norm takes away."""
    lengths = heads.flatten(1).norm(dim=1).clamp_min(TINY)
    return heads * (lengths.mean() / lengths)[:, None, None]


def group_owners(group: list[int], per: int) -> Tensor:
    """Which of the group's old heads each of its query heads used, as a place in the group; `per` query heads for each."""
    return torch.arange(len(group)).repeat_interleave(per)


def _joint(group: list[int], width: int) -> Tensor:
    """Where the group's heads lie among the dimensions of all heads one after the other."""
    return torch.cat([torch.arange(j * width, (j + 1) * width) for j in group])


def merge_group_values(sums: dict[str, Tensor], outputs: Tensor, group: list[int], per: int) -> closed_form.ValueMerge:
    """The group's values in one, `outputs` [E, n, V] being those of its query heads; `ValueMerge.outputs` [n, V, V] too."""
    width, owners = outputs.shape[2], group_owners(group, per)
    if "value_dimensions" in sums:
        moments = sums["value_dimensions"][head_order([group], per)][:, :, group][:, :, :, group]
        return closed_form.merge_gated_values(moments, outputs.transpose(0, 1), owners)
    merged = closed_form.merge_values(*group_values(sums, outputs, group, width), width)
    return replace(merged, outputs=merged.outputs[owners])


def group_values(sums: dict[str, Tensor], outputs: Tensor, group: list[int], width: int) -> tuple[Tensor, Tensor]:
    """The moment of the group's values and their metric, as `closed_form` has them. `outputs` [E, n, V] of its query heads."""
    joint, owners = _joint(group, width), group_owners(group, outputs.shape[1] // len(group))
    return sums["values"][joint][:, joint], closed_form.output_metric(outputs.transpose(0, 1), owners, len(group))


def group_keys(sums: dict[str, Tensor], group: list[int], per: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of the group's keys, of their rotated pairs and of its queries, as `closed_form` has them."""
    joint, heads, pairs = _joint(group, width), head_order([group], per), _pairs(sums)
    group_pairs = pairs[heads][:, :, group][:, :, :, group] if pairs is not None else torch.empty(len(heads), 0, 1, 1)
    return sums["keys"][joint][:, joint], group_pairs, sums["queries"][heads]


def _pairs(sums: dict[str, Tensor]) -> Tensor | None:
    return torch.view_as_complex(sums["key_pairs"].contiguous()) if "key_pairs" in sums else None


def choose_groups(
    traits: AttentionTraits, sums: dict[str, Tensor], outputs: Tensor, count: int, kv_heads: int
) -> list[list[int]]:
    """Which of `count` old heads share a new one: searched where heads may change places, else contiguous."""
    size, heads = count // kv_heads, outputs.shape[1]
    if not traits.movable or kv_heads == 1 or size == 1:
        return [list(range(r * size, (r + 1) * size)) for r in range(kv_heads)]
    owned = [range(j * heads // count, (j + 1) * heads // count) for j in range(count)]
    metric = torch.stack([closed_form.output_gram(outputs, group) for group in owned])
    return partition(pair_costs(traits, sums, metric), kv_heads)


def _cuts(traits: AttentionTraits) -> list[int]:
    """What is tried. Keys behind a norm whose scales differ on a pair cannot be turned exactly: which does better is seen."""
    if traits.keys and not traits.factors:
        return [closed_form.AVERAGED, *([traits.pairs] if traits.pairs else [])]
    if not traits.keys or not traits.factors or traits.normed or not traits.pairs:
        return [traits.pairs]
    return sorted({round(share * traits.pairs) for share in CUTS})


def _merge_keys(
    traits: AttentionTraits,
    q: Tensor,
    k: Tensor,
    sums: dict[str, Tensor],
    groups: list[list[int]],
    per: int,
    cut: int,
    one_length: bool,
) -> tuple[Tensor, Tensor, float]:
    """New queries [H, D, E'] and keys [G, D, E'], and the share of the scores' energy that they are expected to lose.
    `one_length`: a norm of each head follows."""
    if not traits.keys:
        return q, torch.stack([k[group].mean(0) for group in groups]), max(_unlike(k[group]) for group in groups)
    order, new_q, new_k, errors = list(traits.order), [], [], []
    for group in groups:
        moments, owners = group_keys(sums, group, per, len(order)), group_owners(group, per)
        merged = closed_form.merge_keys(traits, *moments, owners, cut)
        errors.append(closed_form.key_error(traits, merged, moments[0], moments[2], owners))
        own = k[group][:, order]
        if one_length and cut != closed_form.AVERAGED:
            own = _one_length(own)
        new_k.append(merged.keys @ own.flatten(0, 1))
        new_q.append(merged.queries @ q[head_order([group], per)][:, order])
    lost, total = (sum(part) for part in zip(*errors, strict=True))
    return torch.cat(new_q), torch.stack(new_k), lost / max(total, TINY)


@rounded()
def _rows_of(view: View, merged: Merged, attention: Attention, weight: Tensor) -> fit_values.Mixed:
    """The sampled rows of one batch for the fit of values and outputs."""
    size, parts, targets, tokens = len(merged.heads) // len(merged.groups), [], [], []
    for target in view.targets:
        mixed = []
        for r, group in enumerate(merged.groups):
            weights = target.weights[:, merged.heads[r * size : (r + 1) * size]]
            mixed.append(weights @ view.values[:, None, : target.keys, group].flatten(3))  # [B, n, R, g·V]
        parts.append(torch.stack(mixed, 1).permute(0, 3, 1, 2, 4).flatten(0, 1))
        attended = view.attended[:, target.at]
        targets.append((attended if attention.o_bias is None else attended - attention.o_bias).flatten(0, 1))
        tokens.append(weight[:, target.at].flatten())
    gates = None
    if view.gates is not None:  # [B, H, R, V] → [B·R, G, n, V]
        grouped = [rows[:, merged.heads].unflatten(1, (-1, size)) for rows in view.gates]
        gates = torch.cat([rows.permute(0, 3, 1, 2, 4).flatten(0, 1) for rows in grouped])
    return fit_values.Mixed(torch.cat(parts), torch.cat(targets), torch.cat(tokens), gates)


def refine(traits: AttentionTraits, attention: Attention, merged: Merged, views: list[View], token_power: float) -> None:
    """Better shared values and outputs for what the teacher's attention gives out, on sampled rows."""
    if traits.value_unit:
        _refine_normed(traits, attention, merged, views, token_power)
        return
    assert attention.v is not None and attention.o is not None
    stacked = with_bias(attention.v, attention.v_bias)
    old = torch.stack([stacked[group].flatten(0, 1) for group in merged.groups])  # [G, g·V, E']
    size = len(merged.heads) // len(merged.groups)
    fit, held = (_rows(traits, attention, merged, views, token_power, held) for held in (False, True))
    start = merged.down, merged.o.unflatten(1, (-1, size))
    if traits.gated == OF_DIMENSIONS:  # one dimension after the other: the mean knows of them all
        outputs = attention.o[:, merged.heads].unflatten(1, (-1, size))
        start = fit_values.better_start(held, [start, (_mean_of(start[0]), outputs)])
    down, outputs = fit_values.refine_values(fit, held, *start)
    merged.v, merged.o = down @ old, outputs.flatten(1, 2)


def _refine_normed(
    traits: AttentionTraits, attention: Attention, merged: Merged, views: list[View], token_power: float
) -> None:
    """As `refine`, where a norm follows the values: the outputs for what it makes of the closed form's, or of the mean's."""
    assert attention.v is not None and attention.o is not None
    stacked, size = with_bias(attention.v, attention.v_bias), len(merged.heads) // len(merged.groups)
    averaged = torch.stack([stacked[group].mean(0) for group in merged.groups])
    best: tuple[float, Tensor, Tensor] | None = None
    for v, o in ((merged.v, merged.o), (averaged, attention.o[:, merged.heads])):
        own = replace(merged, groups=[[group] for group in range(len(v))])
        shown = [replace(view, values=_normed(v, view.key_inputs, traits)) for view in views]
        fit, held = (_rows(traits, attention, own, shown, token_power, held) for held in (False, True))
        error, outputs = fit_values.refine_outputs(fit, held, o.unflatten(1, (-1, size)))
        if best is None or error < best[0]:
            best = error, v, outputs.flatten(1, 2)
    assert best is not None
    merged.v, merged.o = best[1:]


def _normed(weight: Tensor, inputs: Tensor, traits: AttentionTraits) -> Tensor:
    """Values [B, S, G, V] of `weight` [G, V, E'] and its `inputs` [B, S, E]."""
    projected = augmented(inputs, weight.shape[-1]) @ weight.flatten(0, 1).T
    return unit_norm(projected.unflatten(-1, weight.shape[:2]), *traits.value_unit)


def _rows(
    traits: AttentionTraits, attention: Attention, merged: Merged, views: list[View], token_power: float, held: bool
) -> fit_values.Mixed:
    """The sampled rows of all batches that are held back, or of those that are not."""
    parts = []
    for view in views:
        if view.batch.held == held:
            weight = view.batch.weights(view.batch.middle(view.attended, traits.residual, view.before), token_power)
            parts.append(_rows_of(view, merged, attention, weight))
    return fit_values.together(parts)


def _mean_of(down: Tensor) -> Tensor:
    """The mean of each group's values in the place of `down` [G, V, g·V]."""
    groups, width, joint = down.shape
    mean = torch.eye(width, device=down.device).repeat(1, joint // width) * (width / joint)
    return mean.expand(groups, -1, -1).clone()


def pack(layer: Layer, traits: AttentionTraits, attention: Attention, merged: Merged) -> dict[str, Tensor]:
    """The layer's stored parts: dimensions and biases back where the model has them."""
    width = attention.q.shape[-1] if attention.q is not None else 0
    back = torch.tensor(traits.order).argsort() if traits.keys else torch.arange(merged.q.shape[1])
    norm = attention.k_norm
    new = Attention(
        q=merged.q[:, back, :width],
        k=merged.k[:, back, :width],
        v=merged.v[..., :width],
        o=merged.o,
        q_bias=merged.q[:, back, width] if attention.q_bias is not None else None,
        k_bias=merged.k[:, back, width] if attention.k_bias is not None else None,
        v_bias=merged.v[..., width] if attention.v_bias is not None else None,
        k_norm=mean(norm, len(merged.groups)) if norm is not None and norm.ndim > 1 else None,
        gate=None if attention.gate is None else attention.gate[merged.heads],
        gate_bias=None if attention.gate_bias is None else attention.gate_bias[merged.heads],
    )
    return LAYOUTS[layer.layout].pack(new, layer.geometry)
