"""Predicts from calibration statistics alone what fewer key/value heads would cost in each layer.

The predictions are for the closed-form merge before any refit, so they are upper bounds. They rank layers and head counts.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upfit.architecture.attention import LAYOUTS, Attention, Layer
from upfit.architecture.loading import pick_device
from upfit.calibration.gather import gather_layer
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.sample import sample_for
from upfit.calibration.traits import AttentionTraits
from upfit.convert import result
from upfit.convert.gqa import closed_form
from upfit.convert.gqa.choice import Choice, statistics_for
from upfit.convert.gqa.merge_layer import choose_groups
from upfit.convert.result import LayerChoices, Sensitivity, TotalChoice

if TYPE_CHECKING:
    from upfit.convert.recipe import FitContext

CUT = 0.6  # share of the pairs merged as rotated: the prediction cannot choose it, for it takes slow rotations for none


def predict(context: "FitContext", choice: Choice) -> Sensitivity:
    """For each attention layer and each possible number of key/value heads: `attention_error`, the lost share of the scores'
    variance under the attention, and `output_error`, the lost share of what the values bring to the output; and the bytes a
    token takes in the layer's cache. Raises Opaque when the model cannot be run on text."""
    architecture = context.architecture
    counts = architecture.allowed_kv_heads()
    statistics = statistics_for(context, choice)
    layers = {layer.path: layer for layer in architecture.layers}
    rows = []
    if statistics is not None:
        stored = [(path, statistics.layer(path)) for path in layers]
        rows = [_row(context, layers[path], known, counts) for path, known in stored]
    else:
        sample = sample_for(
            context.folder, context.checkpoint, choice.calibration, choice.tokens, choice.length, context.output
        )
        pieces, held = sample.batches()
        model = LayerwiseModel(context.checkpoint, architecture, pieces, pick_device())
        with context.output.progress("watching", len(model.blocks)) as meter:
            for index in range(len(model.blocks)):
                gathered = gather_layer(model, architecture, index, held)
                meter.advance(1)
                if gathered is not None:
                    known = None if isinstance(gathered.traits, str) else (gathered.traits, gathered.sums)
                    rows.append(_row(context, layers[gathered.path], known, counts))
    return Sensitivity(counts, rows, totals(counts, rows))


def _row(
    context: "FitContext", layer: Layer, known: tuple[AttentionTraits, dict[str, Tensor]] | None, counts: list[int]
) -> LayerChoices:
    choices = []
    parts = {part: context.checkpoint.read(name) for part, name in layer.names.items() if part.startswith("o.")}
    attention = LAYOUTS[layer.layout].unpack(parts, layer.geometry)
    for count in counts:
        if count > layer.geometry.kv_heads:
            continue
        errors = _errors(known, attention, layer, count) if known else (None, None)
        share = layer.kv_bytes_per_token * count // layer.geometry.kv_heads
        choices.append(result.Choice(count, *errors, share))
    return LayerChoices(layer.path, layer.geometry.kv_heads, choices)


def _errors(
    known: tuple[AttentionTraits, dict[str, Tensor]], attention: Attention, layer: Layer, count: int
) -> tuple[float | None, float | None]:
    if count == layer.geometry.kv_heads:
        return 0.0, 0.0
    traits, sums = known[0], {name: tensor.double() for name, tensor in known[1].items()}
    assert attention.o is not None
    outputs = attention.o.double()
    old, heads = layer.geometry.kv_heads, layer.geometry.heads
    per = heads // old
    groups = choose_groups(traits, sums, outputs, old, count)
    lost = {"keys": 0.0, "values": 0.0}
    total = {"keys": 1e-30, "values": 1e-30}  # no division by 0
    for group in groups:
        own = [h for j in group for h in range(j * per, (j + 1) * per)]
        owners = torch.arange(len(group)).repeat_interleave(per)
        if traits.keys:
            width = layer.geometry.head_dim
            joint = torch.cat([torch.arange(j * width, (j + 1) * width) for j in group])
            pairs = torch.view_as_complex(sums["key_pairs"].contiguous()) if "key_pairs" in sums else None
            group_pairs = pairs[own][:, :, group][:, :, :, group] if pairs is not None else torch.empty(len(own), 0, 1, 1)
            keys, queries = sums["keys"][joint][:, joint], sums["queries"][own]
            merged = closed_form.merge_keys(traits, keys, group_pairs, queries, owners, round(CUT * traits.pairs))
            part_lost, all_of_it = closed_form.key_error(traits, merged, keys, queries, owners)
            lost["keys"] += part_lost
            total["keys"] += all_of_it
        if traits.values:
            width = layer.geometry.v_head_dim
            joint = torch.cat([torch.arange(j * width, (j + 1) * width) for j in group])
            metric = closed_form.output_metric(outputs[:, own].transpose(0, 1), owners, len(group))
            moment = sums["values"][joint][:, joint]
            power = float((moment * metric).sum())
            lost["values"] += closed_form.reduce(moment, metric, width)[2] * power
            total["values"] += power
    attention_error = lost["keys"] / total["keys"] if traits.keys else None
    return attention_error, lost["values"] / total["values"] if traits.values else None


def totals(counts: list[int], layers: list[LayerChoices]) -> list[TotalChoice]:
    """For each number of heads: the mean and the largest predicted errors over the layers, and the cache's bytes a token (a
    layer that has fewer heads stays as it is)."""
    rows = []
    for count in counts:
        choices = [max((c for c in layer.choices if c.kv_heads <= count), key=lambda c: c.kv_heads) for layer in layers]
        attention = _mean_and_largest([choice.attention_error for choice in choices])
        output = _mean_and_largest([choice.output_error for choice in choices])
        rows.append(TotalChoice(count, sum(choice.kv_bytes_per_token for choice in choices), *attention, *output))
    return rows


def _mean_and_largest(errors: list[float | None]) -> tuple[float | None, float | None]:
    known = [error for error in errors if error is not None]
    return (sum(known) / len(known), max(known)) if known else (None, None)
