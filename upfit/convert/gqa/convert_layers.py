"""Aligned merging of a whole model, layer by layer.

Two models run side by side through the same layers: the teacher and the converted one. At each layer the teacher is watched and
its heads are merged in closed form (`closed_form.py`). Then, with `refit`, on what the converted model really sees, queries and
keys are fitted to the teacher's scores (`calibration/scores`), the output projection to the teacher's stream after the
attention, and the last matrix of the MLP to the teacher's stream after the layer (`calibration/stream_refit.py`). Nothing is
chosen on the rows that are fitted: the cut of slow pairs, Gauss–Newton steps and ridges are chosen on held-back windows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from upfit.architecture.attention import LAYOUTS, Attention
from upfit.calibration.layerwise import Block, find_blocks, observed_model
from upfit.calibration.observe import Opaque
from upfit.calibration.products import quick_products
from upfit.calibration.ridge import augmented
from upfit.calibration.rotation import Turns, unit_norm
from upfit.calibration.scores import fit as fit_scores
from upfit.calibration.scores.problem import Batch, Form, Norm, Target, Weights, input_moments, norm_in_order
from upfit.calibration.stream_refit import Drifts, adopt, drifts_of, mapped, refit_stream, student_inputs
from upfit.calibration.teacher_student import LayerPair, pass_by, put, stream_error
from upfit.calibration.teacher_view import View
from upfit.calibration.traits import AttentionTraits
from upfit.convert.fitting import LayerFits
from upfit.convert.gqa.layer_state import LayerRecord, Merged, Settings, watch_layer
from upfit.convert.gqa.merge_layer import merge_layer, pack, refine
from upfit.convert.gqa.pooling import pool_heads as merge_plainly

NEARLY_NOTHING = 1e-2  # of the energy; what rounding loses, 1e-5, is far below what such a merge does
LayerStatistics = tuple[AttentionTraits, dict[str, Tensor]]


def convert_layers(
    fits: LayerFits,
    target_config: dict[str, Any],
    statistics: Callable[[str], LayerStatistics | None],
    settings: Settings,
) -> None:
    """Merge the heads of every layer of `fits`, in the model of `target_config`.

    `statistics(path)` gives an attention's traits and statistics if calibration left them, else they are gathered on the way.
    """
    students: list[Block] = []
    index = -1
    for pair in fits:
        if not students:
            device = str(pair.batches[0].teacher.device)
            students = find_blocks(observed_model(target_config, device), fits.context.architecture)
        student = students[pair.index].module
        if pair.index != index:  # not the second attention of a layer
            adopt(student, pair.block.module)
        index = pair.index
        record, tensors = _convert(replace(pair, student=student), statistics(pair.layer.path), settings)
        if pair.last:
            pair.model.empty(student)
        error = record.fitted_error if record.fitted_error is not None else record.merged_error
        fits.store(pair, record.record(), tensors, note=f"score error {error:.3f}" if error is not None else "")


def _convert(pair: LayerPair, statistics: LayerStatistics | None, settings: Settings) -> tuple[LayerRecord, dict[str, Tensor]]:
    record, layout, device = LayerRecord(pair.layer.path), LAYOUTS[pair.layer.layout], pair.batches[0].teacher.device
    stored = {part: pair.model.weights.checkpoint.read(name).float() for part, name in pair.layer.names.items()}
    attention = layout.unpack({part: tensor.to(device) for part, tensor in stored.items()}, pair.layer.geometry)
    try:
        traits, turns = pair.probe()
    except Opaque as reason:
        record.reasons = (f"{reason}, so heads are averaged",)
        return record, _average(pair, attention, settings.kv_heads)
    record.reasons, record.pairs = traits.reasons, traits.pairs
    views, sums = watch_layer(pair, traits, attention, settings)
    traits, sums = statistics if statistics is not None else (traits, sums)
    sums = {name: tensor.float().double().cpu() for name, tensor in sums.items()}  # as a statistics file has them
    merges = merge_layer(traits, layout.unpack(stored, pair.layer.geometry), sums, settings.kv_heads, record)
    choices = {cut: merge.to(device) for cut, merge in merges.items()}
    form = _form(pair, traits, turns, attention, views[0].scaling * turns.scale, settings.kv_heads)
    lossy = min(merge.lost for merge in merges.values()) > NEARLY_NOTHING  # and where nothing is lost, rounding shall not be
    with quick_products(device, lossy):
        merged = _fit_heads(pair, traits, attention, form, choices, views, settings, record)
        new = _fit_layer(pair, traits, attention, merged, views, settings, record)
    return record, new


def _fit_layer(
    pair: LayerPair,
    traits: AttentionTraits,
    attention: Attention,
    merged: Merged,
    views: list[View],
    settings: Settings,
    record: LayerRecord,
) -> dict[str, Tensor]:
    """The layer's new tensors by name, with its heads `merged`; both streams move on."""
    for view in views:
        view.targets.clear()  # of a large model they are what the ridges below need room for
    new = _replace_parts(pair, pack(pair.layer, traits, attention, merged), ("q", "k", "v", "k_norm", "o"))
    if settings.refit:
        new |= refit_stream(pair, traits, views, settings.token_power)
    if pair.last:
        for view in views:
            view.batch.teacher = view.output
            if not settings.refit:
                view.batch.follow(pair.index)
        record.stream_error = stream_error(pair.batches) if settings.refit else None
    return new


def _average(pair: LayerPair, attention: Attention, kv_heads: int) -> dict[str, Tensor]:
    """The mean of the heads, for a layer that cannot be watched; both streams move on."""
    merged = merge_plainly(attention, kv_heads, "mean", 0, 0.0)
    new = _replace_parts(pair, LAYOUTS[pair.layer.layout].pack(merged, pair.layer.geometry), ("k", "v", "k_norm"))
    if pair.last:
        for batch in pair.batches:
            batch.student = pair.run(batch)
        pass_by(pair.block.module, pair.index, pair.batches, alone=True)
    return new


def _replace_parts(pair: LayerPair, packed: dict[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Put these parts into the student's layer, as far as `packed` has them; the tensors by name."""
    for part in parts:
        if f"{part}.weight" in packed:
            put(pair.student, pair.path(part), packed[f"{part}.weight"], packed.get(f"{part}.bias"))
    return {pair.layer.names[name]: tensor for name, tensor in packed.items() if name.partition(".")[0] in parts}


def _fit_heads(
    pair: LayerPair,
    traits: AttentionTraits,
    attention: Attention,
    form: Form | None,
    choices: dict[int, Merged],
    views: list[View],
    settings: Settings,
    record: LayerRecord,
) -> Merged:
    """One of the merges, fitted to the teacher's attention and, with refit, brought onto what the student sees."""
    merged = next(iter(choices.values()))
    if traits.values:
        refine(traits, attention, merged, views, settings.token_power)
    inputs = student_inputs(pair, views) if settings.refit else [(view.inputs, view.key_inputs) for view in views]
    drifts = drifts_of(inputs, views) if settings.refit else (None, None)
    merged.v = mapped(merged.v, drifts[1])
    if traits.keys and form is not None:
        _fit_scores(choices, merged, form, inputs, views, drifts, settings, record)
    else:
        merged.q, merged.k = mapped(merged.q, drifts[0]), mapped(merged.k, drifts[1])
    return merged


def _form(
    pair: LayerPair, traits: AttentionTraits, turns: Turns, attention: Attention, scaling: float, kv_heads: int
) -> Form | None:
    """How the student's projections become scores. None when its norms cannot be applied to heads in another order."""
    norms: dict[str, Norm | None] = {"q_norm": None, "k_norm": None}
    if traits.unit:
        units = traits.unit[:2], traits.unit[2:]
        norms = {part: partial(unit_norm, scale=a, epsilon=e) for part, (a, e) in zip(norms, units, strict=True)}
    for part in norms:
        try:
            module = pair.student.get_submodule(pair.path(part))
        except AttributeError:
            continue
        own = getattr(attention, part)
        if own is not None and own.ndim > 1:
            return None  # a scale for each head, or one over all heads: fitted by nothing but the drift
        norms[part] = norm_in_order(module, list(traits.order))
    shape = pair.layer.geometry
    heads = (shape.heads, kv_heads, shape.head_dim)
    return Form(turns, norms["q_norm"], norms["k_norm"], *heads, scaling, traits.norm_last)


def _fit_scores(
    choices: dict[int, Merged],
    merged: Merged,
    form: Form,
    inputs: list[tuple[Tensor, Tensor]],
    views: list[View],
    drifts: Drifts,
    settings: Settings,
    record: LayerRecord,
) -> None:
    """Choose the cut on held-back rows, then, when refitting, fit q and k. Changes `merged`."""
    widths = merged.q.shape[-1], merged.k.shape[-1]
    problems: dict[bool, list[Batch]] = {False: [], True: []}
    for (of_queries, of_keys), view in zip(inputs, views, strict=True):
        targets = [_reordered(target, merged.heads) for target in view.targets]
        q_inputs = augmented(of_queries, widths[0])
        same = of_keys is of_queries and widths[0] == widths[1]
        batch = Batch(q_inputs, targets, None if same else augmented(of_keys, widths[1]), view.turns)
        problems[view.batch.held].append(batch)

    def start(cut: int) -> Weights:
        q, k = mapped(choices[cut].q, drifts[0]), mapped(choices[cut].k, drifts[1])
        return Weights(q.flatten(0, 1), k.flatten(0, 1))

    errors = {cut: fit_scores.held_error(problems[True], form, start(cut)) for cut in choices}
    record.cut = min(errors, key=lambda cut: errors[cut])
    record.merged_error, weights = errors[record.cut], start(record.cut)
    if settings.refit:
        moments = input_moments(problems[False], *widths)
        result = fit_scores.fit_scores(problems[False], problems[True], form, weights, *moments, settings.effort)
        weights, record.fitted_error = result.weights, result.after
    merged.q = weights.q.unflatten(0, (-1, form.width))
    merged.k = weights.k.unflatten(0, (-1, form.width))


def _reordered(target: Target, heads: list[int]) -> Target:
    if heads == sorted(heads):
        return target
    scores, weights, importance = target.scores[:, heads], target.weights[:, heads], target.importance[:, heads]
    return Target(target.at, target.keys, scores, weights, importance)
