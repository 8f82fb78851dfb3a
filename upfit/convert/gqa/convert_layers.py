"""Aligned merging of a whole model, layer by layer.

Two models run side by side through the same layers: the teacher and the converted one. At each layer the teacher is watched and
its heads are merged in closed form (`closed_form.py`). Then, with `refit`, on what the converted model really sees, queries and
keys are fitted to the teacher's scores (`fit_scores.py`), the output projection to the teacher's stream after the attention,
and the last matrix of the MLP to the teacher's stream after the layer (`fit_values.py`). Nothing is chosen on the rows that are
fitted: the cut of slow pairs, Gauss–Newton steps and ridges are chosen on held-back windows.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upfit.architecture.attention import LAYOUTS, Attention
from upfit.calibration.between import PLAIN
from upfit.calibration.layerwise import Block, find_blocks, observed_model
from upfit.calibration.observe import Opaque, knowing, tapped
from upfit.calibration.products import quick_products
from upfit.calibration.residual import Residual
from upfit.calibration.ridge import augmented, ridge_linear
from upfit.calibration.rotation import Turns, unit_norm
from upfit.calibration.teacher_student import (
    LayerPair,
    MlpEnd,
    PairedBatch,
    mlp_end,
    pass_by,
    put,
    refit_mlp,
    row_sums,
    stream_error,
)
from upfit.calibration.traits import AttentionTraits
from upfit.convert.fitting import LayerFits
from upfit.convert.gqa import fit_scores, fit_values
from upfit.convert.gqa.layer_state import LayerRecord, Merged, Settings, View, watch_teacher
from upfit.convert.gqa.merge_layer import merge_layer, pack, refine
from upfit.convert.gqa.pooling import pool_heads as merge_plainly
from upfit.convert.gqa.score_problem import Batch, Form, Norm, Target, Weights

NEARLY_NOTHING = 1e-2  # of the energy; what rounding loses, 1e-5, is far below what such a merge does
DRIFT_RIDGE = 1e-3  # of the mean power of an input: directions that the text hardly has stay small
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
            _adopt(student, pair.block.module)
        index = pair.index
        record, tensors = _convert(replace(pair, student=student), statistics(pair.layer.path), settings)
        if pair.last:
            pair.model.empty(student)
        error = record.fitted_error if record.fitted_error is not None else record.merged_error
        fits.store(pair, record.record(), tensors, note=f"score error {error:.3f}" if error is not None else "")


def _adopt(student: nn.Module, teacher: nn.Module) -> None:
    """The student's layer shares every weight of the teacher's that has the same shape."""
    theirs = dict(teacher.named_modules())
    for path, module in student.named_modules():
        for kind in ("_parameters", "_buffers"):
            own, other = getattr(module, kind), getattr(theirs[path], kind)
            for name, tensor in own.items():
                if tensor is not None and other[name].shape == tensor.shape:
                    own[name] = other[name]


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
    views, sums = watch_teacher(pair, traits, attention, settings)
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
        new |= _refit_stream(pair, traits, views, settings)
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
    inputs = _student_inputs(pair, views) if settings.refit else [(view.inputs, view.key_inputs) for view in views]
    drifts = _drifts(inputs, views) if settings.refit else (None, None)
    merged.v = _mapped(merged.v, drifts[1])
    if traits.keys and form is not None:
        _fit_scores(choices, merged, form, inputs, views, drifts, settings, record)
    else:
        merged.q, merged.k = _mapped(merged.q, drifts[0]), _mapped(merged.k, drifts[1])
    return merged


def _student_inputs(pair: LayerPair, views: list[View]) -> list[tuple[Tensor, Tensor]]:
    """What the student's projections of queries and of keys are given, of each batch."""
    of_queries = [pair.run_until(pair.path("q"), view.batch) for view in views]
    if not views[0].cross:
        return [(x, x) for x in of_queries]
    of_keys = [pair.run_until(pair.path("k"), view.batch) for view in views]
    # A projection that runs twice, on both streams one after the other (T5Gemma 2), is not ours to follow.
    same = all(x.shape == view.key_inputs.shape for x, view in zip(of_keys, views, strict=True))
    return list(zip(of_queries, of_keys if same else [view.key_inputs for view in views], strict=True))


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
        norms[part] = _in_order(module, list(traits.order))
    shape = pair.layer.geometry
    heads = (shape.heads, kv_heads, shape.head_dim)
    return Form(turns, norms["q_norm"], norms["k_norm"], *heads, scaling, traits.norm_last)


def _in_order(module: nn.Module, order: list[int]) -> Norm:
    """`module`, which norms heads as the model stores them, on heads whose dimensions are in `AttentionTraits.order`."""
    back = torch.tensor(order).argsort().tolist()

    def norm(heads: Tensor) -> Tensor:
        normed: Tensor = module(heads[..., back])
        return normed[..., order]

    return norm


Drifts = tuple[Tensor | None, Tensor | None]  # of the inputs of queries and of keys


def _drifts(inputs: list[tuple[Tensor, Tensor]], views: list[View]) -> Drifts:
    of_queries = _drift([q for q, _ in inputs], views)
    return of_queries, _drift([k for _, k in inputs], views, of_keys=True) if views[0].cross else of_queries


def _drift(inputs: list[Tensor], views: list[View], of_keys: bool = False) -> Tensor:
    """M [E, E] that best takes what the student sees to what the teacher saw: W M x_student ≈ W x_teacher."""
    wanted = [view.key_inputs if of_keys else view.inputs for view in views]
    gap = sum(float((x - aim).square().sum()) for x, aim in zip(inputs, wanted, strict=True))
    if gap <= fit_values.NEGLIGIBLE * sum(float(aim.square().sum()) for aim in wanted):
        return torch.eye(inputs[0].shape[-1], device=inputs[0].device)
    own = cross = torch.zeros((), dtype=torch.float64)
    for view, *pair in zip(views, inputs, wanted, strict=True):
        if not view.batch.held:
            counted = None if of_keys else view.batch.counted
            flat, aim = (x.flatten(0, 1) if counted is None else x[counted] for x in pair)
            own, cross = own + (flat.T @ flat).double(), cross + (aim.T @ flat).double()
    ridge = DRIFT_RIDGE * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
    return torch.linalg.solve(own + ridge, (cross + ridge).T).T.float()


def _mapped(weight: Tensor, drift: Tensor | None) -> Tensor:
    """`weight` [heads, D, E'] on inputs that `drift` [E, E] brings back; a bias column stays."""
    return weight if drift is None else torch.cat([weight[..., : len(drift)] @ drift, weight[..., len(drift) :]], -1)


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
        batch = Batch(q_inputs, targets, None if same else augmented(of_keys, widths[1]))
        problems[view.batch.held].append(batch)

    def start(cut: int) -> Weights:
        q, k = _mapped(choices[cut].q, drifts[0]), _mapped(choices[cut].k, drifts[1])
        return Weights(q.flatten(0, 1), k.flatten(0, 1))

    errors = {cut: fit_scores.held_error(problems[True], form, start(cut)) for cut in choices}
    record.cut = min(errors, key=lambda cut: errors[cut])
    record.merged_error, weights = errors[record.cut], start(record.cut)
    if settings.refit:
        moments = _input_moments(problems[False], *widths)
        result = fit_scores.fit_scores(problems[False], problems[True], form, weights, *moments, settings.effort)
        weights, record.fitted_error = result.weights, result.after
    merged.q = weights.q.unflatten(0, (-1, form.width))
    merged.k = weights.k.unflatten(0, (-1, form.width))


def _input_moments(problems: list[Batch], q_width: int, k_width: int) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ [E', E'] of the inputs of queries and, weighted as the attention looks at them, of keys."""
    q_moment, k_moment = (torch.zeros(size, size, device=problems[0].inputs.device) for size in (q_width, k_width))
    for problem in problems:
        flat = problem.inputs.flatten(0, 1)
        q_moment = q_moment + flat.T @ flat
        for target in problem.targets:
            sharp = torch.addcmul(target.weights, target.weights, target.weights, value=-1)
            looked = (target.importance.flatten(1)[:, None] @ sharp.flatten(1, 2))[:, 0]  # [B, L]
            seen = problem.key_inputs[:, : target.keys]
            k_moment = k_moment + (seen * looked[..., None]).flatten(0, 1).T @ seen.flatten(0, 1)
    return q_moment, k_moment


def _reordered(target: Target, heads: list[int]) -> Target:
    if heads == sorted(heads):
        return target
    scores, weights, importance = target.scores[:, heads], target.weights[:, heads], target.importance[:, heads]
    return Target(target.at, target.keys, scores, weights, importance)


def _refit_stream(pair: LayerPair, traits: AttentionTraits, views: list[View], settings: Settings) -> dict[str, Tensor]:
    """Ridges for the output projection and for the last matrix of the MLP; moves the student on. The new tensors by name."""
    new, attended = _refit_output(pair, traits.residual, views, settings.token_power)
    end = mlp_end(pair, traits.residual) if pair.last else None
    if traits.residual is not None and end is not None:
        totals = [view.total for view in views]
        if traits.residual.normed:
            return new | _refit_normed_mlp(pair, traits.residual, end, totals, settings.token_power)
        return new | _refit_mlp(pair, traits, end, attended, totals, settings.token_power)
    if pair.last:
        for batch in pair.batches:
            batch.student = pair.run(batch)
    return new


def _refit_output(
    pair: LayerPair, residual: Residual | None, views: list[View], token_power: float
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """The output projection, fitted to the teacher's stream after the attention; of each batch too its inputs [B, T, Z] and the
    student's stream [B, T, E] that it adds to."""
    path, names, attended, befores = pair.path("o"), pair.layer.names, list[Tensor](), list[Tensor]()

    def rows(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor, Tensor]:
        z, before = pair.run_to(path, batch, residual)
        attended.append(z)
        befores.append(before)
        middle = batch.middle(views[number].attended, residual, views[number].before)
        wanted = views[number].attended if residual is None else (middle - before) / residual.attention
        return z, wanted, middle

    projection = pair.linear(path)
    weight, bias = ridge_linear(row_sums(projection, pair.batches, rows, token_power), projection)
    put(pair.student, path, weight, bias)
    new = {names["o.weight"]: weight} | ({} if bias is None else {names["o.bias"]: bias})
    return new, list(zip(attended, befores, strict=True))


def _refit_mlp(
    pair: LayerPair,
    traits: AttentionTraits,
    end: MlpEnd,
    attended: list[tuple[Tensor, Tensor]],
    outputs: list[Tensor],
    token_power: float,
) -> dict[str, Tensor]:
    """The last matrix of the MLP, fitted to the teacher's stream after the layer, to which the student moves on."""
    assert traits.residual is not None
    residual, own = traits.residual, pair.student.get_submodule(pair.place.at)
    projection, down = pair.linear(pair.path("o")), pair.linear(end.path)
    inner, middles = list[Tensor](), list[Tensor]()

    def rest(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor]:
        z, before = attended[number]
        with knowing(own, z) if traits.gated == PLAIN else nullcontext():  # else z is not what the attention gave out
            inner.append(pair.run_until(end.path, batch))
        middles.append(before + residual.attention * projection(z))
        return inner[number], middles[number]

    new = refit_mlp(pair.student, end, residual.mlp, pair.batches, outputs, rest, token_power)
    for batch, middle, part in zip(pair.batches, middles, inner, strict=True):
        batch.student = middle + residual.mlp * down(part)
    return new


def _refit_normed_mlp(
    pair: LayerPair,
    residual: Residual,
    end: MlpEnd,
    totals: list[Tensor],
    token_power: float,
) -> dict[str, Tensor]:
    """As `_refit_mlp`, where a norm follows the sum `totals`, and the MLP adds to what another norm gives out."""
    assert residual.mlp_base is not None
    base = residual.mlp_base

    def rest(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor]:
        with tapped({base: pair.student.get_submodule(base)}) as taps:
            inner = pair.run_until(end.path, batch)
        return inner, taps[base][1]

    new = refit_mlp(pair.student, end, residual.mlp, pair.batches, totals, rest, token_power)
    for batch in pair.batches:
        batch.student = pair.run(batch)
    return new
