"""Merges the heads of one layer in closed form from its statistics, then improves the merge on the teacher's sampled rows."""

import torch
from torch import Tensor

from upfit.architecture.attention import LAYOUTS, Attention
from upfit.calibration.teacher_student import PairedBatch, token_weights
from upfit.calibration.traits import AttentionTraits
from upfit.convert.gqa import closed_form, fit_values
from upfit.convert.gqa.grouping import head_order, pair_costs, partition
from upfit.convert.gqa.layer_state import LayerPair, LayerRecord, Merged, Settings, View, with_bias
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
    pairs = torch.view_as_complex(sums["key_pairs"].contiguous()) if "key_pairs" in sums else None
    groups = choose_groups(traits, sums, o, count, kv_heads)
    record.groups = groups
    per = heads // count
    order = head_order(groups, per)
    new_v, downs, new_o = [], [], o[:, order].clone()
    size = heads // kv_heads
    for r, group in enumerate(groups):
        if not traits.values:
            new_v.append(v[group].mean(0))
            downs.append(torch.empty(0, 0, dtype=v.dtype))
            continue
        width = v.shape[1]
        joint = torch.cat([torch.arange(j * width, (j + 1) * width) for j in group])
        owners = torch.arange(len(group)).repeat_interleave(per)
        outputs = new_o[:, r * size : (r + 1) * size].transpose(0, 1)
        merged = closed_form.merge_values(
            sums["values"][joint][:, joint], closed_form.output_metric(outputs, owners, len(group)), width
        )
        downs.append(merged.values)
        new_v.append(merged.values @ v[group].flatten(0, 1))
        new_o[:, r * size : (r + 1) * size] = torch.einsum("hev,hvw->ehw", outputs, merged.outputs[owners])
    told_cuts = _cuts(traits)
    result = {}
    for cut in told_cuts:
        if traits.keys:
            new_q, new_k = _merge_keys(traits, q, k, sums, pairs, groups, per, cut)
        else:
            new_q, new_k = q, torch.stack([k[group].mean(0) for group in groups])
        result[cut] = Merged(
            new_q.float(), new_k.float(), torch.stack(new_v).float(), new_o.float(), torch.stack(downs).float(), order, groups
        )
    return result


def choose_groups(
    traits: AttentionTraits, sums: dict[str, Tensor], outputs: Tensor, count: int, kv_heads: int
) -> list[list[int]]:
    """Which of `count` old heads share a new one: searched where heads may change places, else contiguous."""
    size, heads = count // kv_heads, outputs.shape[1]
    if not traits.movable or kv_heads == 1 or size == 1:
        return [list(range(r * size, (r + 1) * size)) for r in range(kv_heads)]
    pairs = torch.view_as_complex(sums["key_pairs"].contiguous()) if "key_pairs" in sums else None
    owned = [range(j * heads // count, (j + 1) * heads // count) for j in range(count)]
    metric = torch.stack([closed_form.output_gram(outputs, group) for group in owned])
    return partition(pair_costs(traits, pairs, sums.get("queries"), sums.get("values"), metric), kv_heads)


def _cuts(traits: AttentionTraits) -> list[int]:
    if not traits.keys or not traits.factors or traits.normed or not traits.pairs:
        return [traits.pairs]
    return sorted({round(share * traits.pairs) for share in CUTS})


def _merge_keys(
    traits: AttentionTraits,
    q: Tensor,
    k: Tensor,
    sums: dict[str, Tensor],
    pairs: Tensor | None,
    groups: list[list[int]],
    per: int,
    cut: int,
) -> tuple[Tensor, Tensor]:
    order, width = list(traits.order), len(traits.order)
    new_q, new_k = [], []
    for group in groups:
        heads = [h for j in group for h in range(j * per, (j + 1) * per)]
        owners = torch.arange(len(group)).repeat_interleave(per)
        joint = torch.cat([torch.arange(j * width, (j + 1) * width) for j in group])
        group_pairs = pairs[heads][:, :, group][:, :, :, group] if pairs is not None else torch.empty(len(heads), 0, 1, 1)
        merged = closed_form.merge_keys(traits, sums["keys"][joint][:, joint], group_pairs, sums["queries"][heads], owners, cut)
        new_k.append(merged.keys @ k[group][:, order].flatten(0, 1))
        new_q.append(merged.queries @ q[heads][:, order])
    return torch.cat(new_q), torch.stack(new_k)


def _rows_of(view: View, traits: AttentionTraits, merged: Merged, attention: Attention, weight: Tensor) -> fit_values.Mixed:
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
    return fit_values.Mixed(torch.cat(parts), torch.cat(targets), torch.cat(tokens))


def refine(
    traits: AttentionTraits,
    attention: Attention,
    merged: Merged,
    views: list[View],
    batches: list[PairedBatch],
    settings: Settings,
) -> None:
    """Better shared values and outputs for what the teacher's attention gives out, on sampled rows."""

    def rows(held: bool) -> fit_values.Mixed:
        mixed = []
        for view, batch in zip(views, batches, strict=True):
            if batch.held == held:
                weight = token_weights(batch.middle(view.attended, traits.residual), settings.token_power)
                mixed.append(_rows_of(view, traits, merged, attention, weight))
        return fit_values.Mixed(
            *(torch.cat([getattr(rows_mixed, name) for rows_mixed in mixed]) for name in ("values", "target", "weight"))
        )

    assert attention.v is not None
    stacked = with_bias(attention.v, attention.v_bias)
    old = torch.stack([stacked[group].flatten(0, 1) for group in merged.groups])  # [G, g·V, E']
    size = len(merged.heads) // len(merged.groups)
    down, outputs = fit_values.refine_values(rows(held=False), rows(held=True), merged.down, merged.o.unflatten(1, (-1, size)))
    merged.v, merged.o = down @ old, outputs.flatten(1, 2)


def pack(place: LayerPair, traits: AttentionTraits, attention: Attention, merged: Merged) -> dict[str, Tensor]:
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
        k_norm=mean(norm, place.kv_heads) if norm is not None and norm.ndim > 1 else None,
    )
    return LAYOUTS[place.layer.layout].pack(new, place.shape)
