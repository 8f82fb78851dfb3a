"""Predicts from calibration statistics alone what fewer key/value heads would cost in each layer.

The predictions are for the closed-form merge before any refit, so they are upper bounds. They rank layers and head counts.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from upfit.architecture.attention import LAYOUTS, Attention, Layer
from upfit.calibration.gather import gather_layer
from upfit.calibration.sample_for import sample_for
from upfit.calibration.teacher_student import open_pair
from upfit.calibration.traits import AttentionTraits
from upfit.convert import result
from upfit.convert.gqa import closed_form
from upfit.convert.gqa.choice import Choice, statistics_for
from upfit.convert.gqa.grouping import head_order
from upfit.convert.gqa.merge_layer import choose_groups, group_keys, group_owners, merge_group_values
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
        for path, layer in layers.items():
            row, traits = _row(context, layer, statistics.layer(path), counts), statistics.traits[path]
            rows.append(replace(row, reasons=_reasons(traits)))
    else:
        sample = sample_for(
            context.folder, context.checkpoint, choice.calibration, choice.tokens, choice.length, context.output, choice.field
        )
        model, batches = open_pair(context.checkpoint, architecture, sample)
        with context.output.progress("watching", len(model.blocks)) as meter:
            for index in range(len(model.blocks)):
                attentions = gather_layer(model, architecture, index, batches)
                meter.advance(1)
                for gathered in attentions:
                    known = None if isinstance(gathered.traits, str) else (gathered.traits, gathered.sums)
                    row = _row(context, layers[gathered.path], known, counts)
                    rows.append(replace(row, reasons=_reasons(gathered.traits)))
    return Sensitivity(counts, rows, totals(counts, rows, {layer.path for layer in architecture.layers if layer.cross}))


def _reasons(traits: AttentionTraits | str) -> list[str]:
    """What a merge leaves out: of a layer that could not be watched, everything."""
    return [f"{traits}, so heads are averaged"] if isinstance(traits, str) else list(traits.reasons)


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
    return LayerChoices(layer.path, layer.geometry.kv_heads, choices, [])


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
        if traits.keys:
            keys, pairs, queries = group_keys(sums, group, per, layer.geometry.head_dim)
            owners = group_owners(group, per)
            cut = round(CUT * traits.pairs) if traits.factors else closed_form.AVERAGED
            merged = closed_form.merge_keys(traits, keys, pairs, queries, owners, cut)
            group_lost, energy = closed_form.key_error(traits, merged, keys, queries, owners)
            lost["keys"] += group_lost
            total["keys"] += energy
        if traits.values:
            merged_values = merge_group_values(sums, outputs[:, head_order([group], per)], group, per)
            lost["values"] += merged_values.lost * merged_values.power
            total["values"] += merged_values.power
    attention_error = lost["keys"] / total["keys"] if traits.keys else None
    return attention_error, lost["values"] / total["values"] if traits.values else None


def totals(counts: list[int], layers: list[LayerChoices], cross: Collection[str] = ()) -> list[TotalChoice]:
    """For each number of heads: the mean and the largest predicted errors over the layers, and the cache's bytes a token (a
    layer that has fewer heads stays as it is); of those that are `cross`, by their names, the bytes a position read."""
    rows = []
    for count in counts:
        choices = [max((c for c in layer.choices if c.kv_heads <= count), key=lambda c: c.kv_heads) for layer in layers]
        attention = _mean_and_largest([choice.attention_error for choice in choices])
        output = _mean_and_largest([choice.output_error for choice in choices])
        sizes = [(layer.layer in cross, choice.kv_bytes_per_token) for layer, choice in zip(layers, choices, strict=True)]
        own, read = (sum(size for of_cross, size in sizes if of_cross == which) for which in (False, True))
        rows.append(TotalChoice(count, own, *attention, *output, read or None))
    return rows


def _mean_and_largest(errors: list[float | None]) -> tuple[float | None, float | None]:
    known = [error for error in errors if error is not None]
    return (sum(known) / len(known), max(known)) if known else (None, None)
