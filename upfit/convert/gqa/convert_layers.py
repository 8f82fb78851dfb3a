"""Aligned merging of a whole model, layer by layer.

Two models run side by side through the same layers: the teacher and the converted one. At each layer the teacher is watched and
its heads are merged in closed form (`closed_form.py`). Then, with `refit`, on what the converted model really sees, queries and
keys are fitted to the teacher's scores (`fit_scores.py`), the output projection to the teacher's stream after the attention,
and the last matrix of the MLP to the teacher's stream after the layer (`fit_values.py`). Nothing is chosen on the rows that are
fitted: the cut of slow pairs, Gauss–Newton steps and ridges are chosen on held-back windows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upfit.architecture.attention import LAYOUTS, Attention, Layer
from upfit.calibration.layerwise import find_blocks, observed_model
from upfit.calibration.observe import Opaque, run_block, run_until
from upfit.calibration.ridge import Moments, augmented, ridge_linear
from upfit.calibration.teacher_student import PairedBatch, add_rows, mlp_end, put, refit_mlp, stream_error
from upfit.calibration.traits import AttentionTraits, Turns, probe_attention
from upfit.convert.fitting import LayerFit, Walk
from upfit.convert.gqa import fit_scores, fit_values
from upfit.convert.gqa.layer_state import LayerPair, LayerRecord, Merged, Settings, View, watch_teacher
from upfit.convert.gqa.merge_layer import merge_layer, pack, refine
from upfit.convert.gqa.pooling import pool_heads as merge_plainly

DRIFT_RIDGE = 1e-3  # of the mean power of an input: directions that the text hardly has stay small
LayerStatistics = tuple[AttentionTraits, dict[str, Tensor]]


def begin(
    walk: Walk, target_config: dict[str, Any], statistics: Callable[[str], LayerStatistics | None], settings: Settings
) -> Callable[[int, Layer], LayerFit]:
    """The function that merges the layer at an index of the walk.

    `kept(path)` gives an attention's facts and statistics if calibration left them, else they are gathered on the way.
    """
    device, architecture = str(walk.batches[0].teacher.device), walk.context.architecture
    students = find_blocks(observed_model(target_config, device), architecture)

    def convert(index: int, layer: Layer) -> LayerFit:
        block, student = walk.model.blocks[index], students[index].module
        _adopt(student, block.module)
        pair = LayerPair(index, block, student, layer, architecture.entry, settings.kv_heads)
        record, tensors = _convert(pair, walk, statistics(layer.path), settings)
        walk.model.empty(student)
        return LayerFit(layer.path, record.record(), tensors)

    return convert


def _adopt(student: nn.Module, teacher: nn.Module) -> None:
    """The student's layer shares every weight of the teacher's that has the same shape."""
    theirs = dict(teacher.named_modules())
    for path, module in student.named_modules():
        for kind in ("_parameters", "_buffers"):
            own, other = getattr(module, kind), getattr(theirs[path], kind)
            for name, tensor in own.items():
                if tensor is not None and other[name].shape == tensor.shape:
                    own[name] = other[name]


def _convert(
    pair: LayerPair, walk: Walk, statistics: LayerStatistics | None, settings: Settings
) -> tuple[LayerRecord, dict[str, Tensor]]:
    batches, checkpoint = walk.batches, walk.context.checkpoint
    shape, record = pair.shape, LayerRecord(pair.layer.path)
    layout, device = LAYOUTS[pair.layer.layout], batches[0].teacher.device
    stored = {part: checkpoint.read(name).float() for part, name in pair.layer.names.items()}
    attention = layout.unpack({part: tensor.to(device) for part, tensor in stored.items()}, shape)
    try:
        longest = max(batches, key=lambda batch: batch.tokens)
        traits, turns = probe_attention(pair.block, pair.entry, shape, longest.teacher, longest.calls[pair.index])
    except Opaque as reason:
        record.reasons = (f"{reason}, so heads are averaged",)
        return record, _averaged(pair, attention, batches)
    record.reasons, record.pairs = traits.reasons, traits.pairs
    views, sums = watch_teacher(pair, traits, attention, batches, settings)
    traits, sums = statistics if statistics is not None else (traits, sums)
    sums = {name: tensor.float().double().cpu() for name, tensor in sums.items()}  # as a statistics file has them
    merges = merge_layer(traits, layout.unpack(stored, shape), sums, pair.kv_heads, record)
    choices = {cut: merge.to(device) for cut, merge in merges.items()}
    merged = next(iter(choices.values()))
    if traits.values:
        refine(traits, attention, merged, views, batches, settings)
    form = _form(pair, traits, turns, attention, views)
    inputs = [
        _student_inputs(pair, batch) if settings.refit else view.inputs for batch, view in zip(batches, views, strict=True)
    ]
    drift = _drift(inputs, views, batches) if settings.refit else None
    if drift is not None:
        merged.v = _mapped(merged.v, drift)
    if traits.keys and form is not None:
        _fit_scores(choices, merged, form, inputs, views, batches, drift, settings, record)
    elif drift is not None:
        merged.q, merged.k = _mapped(merged.q, drift), _mapped(merged.k, drift)
    for view in views:
        view.targets.clear()  # of a large model they are what the ridges below need room for
    changed = pack(pair, traits, attention, merged)
    for part in ("q", "k", "v"):
        put(pair.student, pair.path(part), changed[f"{part}.weight"], changed.get(f"{part}.bias"))
    if "k_norm.weight" in changed:
        put(pair.student, pair.path("k_norm"), changed["k_norm.weight"], changed.get("k_norm.bias"))
    put(pair.student, pair.path("o"), changed["o.weight"])
    new = {pair.layer.names[part]: tensor for part, tensor in changed.items()}
    if settings.refit:
        _refit_stream(pair, traits, walk, views, new, settings)
    for batch, view in zip(batches, views, strict=True):
        batch.teacher = view.output
        if not settings.refit:
            batch.student = view.output
    record.stream_error = stream_error(batches) if settings.refit else None
    return record, new


def _averaged(pair: LayerPair, attention: Attention, batches: list[PairedBatch]) -> dict[str, Tensor]:
    """The mean of the heads, for a layer that cannot be watched; both streams move on."""
    merged = merge_plainly(attention, pair.kv_heads, "mean", 0, 0.0)
    packed = LAYOUTS[pair.layer.layout].pack(merged, pair.shape)
    for part in ("k", "v", "k_norm"):
        if f"{part}.weight" in packed:
            put(pair.student, pair.path(part), packed[f"{part}.weight"], packed.get(f"{part}.bias"))
    for batch in batches:
        batch.student = run_block(pair.student, batch.student, batch.student_calls[pair.index])
        batch.teacher = run_block(pair.block.module, batch.teacher, batch.calls[pair.index])
    return {pair.layer.names[part]: tensor for part, tensor in packed.items() if part[0] in "kv"}


def _form(
    pair: LayerPair, traits: AttentionTraits, turns: Turns, attention: Attention, views: list[View]
) -> fit_scores.Form | None:
    """How the student's projections become scores. None when its norms cannot be applied to heads in another order."""
    student = pair.student
    norms: dict[str, fit_scores.Norm | None] = {"q_norm": None, "k_norm": None}
    for part in norms:
        try:
            module = student.get_submodule(pair.path(part))
        except AttributeError:
            continue
        own = getattr(attention, part)
        if own is not None and own.ndim > 1:
            return None  # a scale for each head, or one over all heads: fitted by nothing but the drift
        norms[part] = _in_order(module, list(traits.order))
    shape = pair.shape
    return fit_scores.Form(
        turns, norms["q_norm"], norms["k_norm"], shape.heads, pair.kv_heads, shape.head_dim, views[0].scaling
    )


def _in_order(module: nn.Module, order: list[int]) -> fit_scores.Norm:
    """`module`, which norms heads as the model stores them, on heads whose dimensions are in `AttentionTraits.order`."""
    back = torch.tensor(order).argsort().tolist()

    def norm(heads: Tensor) -> Tensor:
        normed: Tensor = module(heads[..., back])
        return normed[..., order]

    return norm


def _student_inputs(pair: LayerPair, batch: PairedBatch) -> Tensor:
    stop = pair.student.get_submodule(pair.path("q"))
    return run_until(pair.student, stop, batch.student, batch.student_calls[pair.index])


def _drift(inputs: list[Tensor], views: list[View], batches: list[PairedBatch]) -> Tensor:
    """M [E, E] that best takes what the student sees to what the teacher saw: W M x_student ≈ W x_teacher."""
    gap = sum(float((x - view.inputs).square().sum()) for x, view in zip(inputs, views, strict=True))
    if gap <= fit_values.NEGLIGIBLE * sum(float(view.inputs.square().sum()) for view in views):
        return torch.eye(inputs[0].shape[-1], device=inputs[0].device)
    own = cross = torch.zeros((), dtype=torch.float64)
    for x, view, batch in zip(inputs, views, batches, strict=True):
        if not batch.held:
            flat, wanted = x.flatten(0, 1), view.inputs.flatten(0, 1)
            own, cross = own + (flat.T @ flat).double(), cross + (wanted.T @ flat).double()
    ridge = DRIFT_RIDGE * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
    return torch.linalg.solve(own + ridge, (cross + ridge).T).T.float()


def _mapped(weight: Tensor, drift: Tensor) -> Tensor:
    """`weight` [heads, D, E'] on inputs that `drift` [E, E] brings back; a bias column stays."""
    width = len(drift)
    return torch.cat([weight[..., :width] @ drift, weight[..., width:]], -1)


def _fit_scores(
    choices: dict[int, Merged],
    merged: Merged,
    form: fit_scores.Form,
    inputs: list[Tensor],
    views: list[View],
    batches: list[PairedBatch],
    drift: Tensor | None,
    settings: Settings,
    record: LayerRecord,
) -> None:
    """Choose the cut on held-back rows, then (with a drift, that is when refitting) fit q and k. Changes `merged`."""
    width = merged.q.shape[-1]
    fitted: list[fit_scores.Batch] = []
    held: list[fit_scores.Batch] = []
    for x, view, batch in zip(inputs, views, batches, strict=True):
        problem = fit_scores.Batch(augmented(x, width), [_reordered(target, merged.heads) for target in view.targets])
        (held if batch.held else fitted).append(problem)
    q_moment = k_moment = torch.zeros(width, width, device=inputs[0].device)
    for problem in fitted:
        flat = problem.inputs.flatten(0, 1)
        q_moment = q_moment + flat.T @ flat
        for target in problem.targets:
            looked = (target.weights * (1 - target.weights) * target.importance).sum((1, 2))  # [B, L]
            seen = problem.inputs[:, : target.keys]
            k_moment = k_moment + (seen * looked[..., None]).flatten(0, 1).T @ seen.flatten(0, 1)
    best: tuple[float, int, fit_scores.Weights] | None = None
    for cut, choice in choices.items():
        q, k = (_mapped(w, drift) if drift is not None else w for w in (choice.q, choice.k))
        start = fit_scores.Weights(q.flatten(0, 1), k.flatten(0, 1))
        error = fit_scores.held_error(held, form, start)
        if best is None or error < best[0]:
            best = (error, cut, start)
    assert best is not None
    record.merged_error, record.cut, weights = best[0], best[1], best[2]
    if settings.refit:
        result = fit_scores.fit_scores(fitted, held, form, weights, q_moment, k_moment, settings.effort)
        weights, record.fitted_error = result.weights, result.after[1]
    merged.q = weights.q.unflatten(0, (-1, form.width))
    merged.k = weights.k.unflatten(0, (-1, form.width))


def _reordered(target: fit_scores.Target, heads: list[int]) -> fit_scores.Target:
    if heads == sorted(heads):
        return target
    return fit_scores.Target(
        target.at, target.keys, target.scores[:, heads], target.weights[:, heads], target.importance[:, heads]
    )


def _refit_stream(
    pair: LayerPair, traits: AttentionTraits, walk: Walk, views: list[View], new: dict[str, Tensor], settings: Settings
) -> None:
    """Ridges for the output projection and for the last matrix of the MLP; moves the student on. Adds to `new`."""
    batches, residual = walk.batches, traits.residual
    projection = pair.student.get_submodule(pair.path("o"))
    assert isinstance(projection, nn.Linear)

    def run_on() -> None:
        for batch in batches:
            batch.student = run_block(pair.student, batch.student, batch.student_calls[pair.index])

    if not traits.values:  # something lies between: only carried on
        return run_on()
    z, sums = [], {False: Moments(), True: Moments()}
    for batch, view in zip(batches, views, strict=True):
        z.append(run_until(pair.student, projection, batch.student, batch.student_calls[pair.index]))
        middle = batch.middle(view.attended, residual)
        wanted = view.attended if residual is None else (middle - batch.student) / residual.attention
        add_rows(sums[batch.held], z[-1], wanted, middle, projection, settings.token_power)
    weight = ridge_linear(sums, projection)
    put(pair.student, pair.path("o"), *weight)
    new[pair.layer.names["o.weight"]] = weight[0]
    if weight[1] is not None:
        new[pair.layer.names["o.bias"]] = weight[1]
    end = mlp_end(walk.model, pair.index, pair.student, residual, walk.context.checkpoint)
    if residual is None or end is None:
        return run_on()
    down, share = pair.student.get_submodule(end.path), residual.attention
    inner: list[Tensor] = []
    middles: list[Tensor] = []

    def rest(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor]:
        inner.append(run_until(pair.student, down, batch.student, batch.student_calls[pair.index]))
        middles.append(batch.student + share * projection(z[number]))
        return inner[-1], middles[-1]

    outputs = [view.output for view in views]
    new |= refit_mlp(pair.student, end, residual.mlp, batches, outputs, rest, settings.token_power)
    for batch, middle, part in zip(batches, middles, inner, strict=True):
        batch.student = middle + residual.mlp * down(part)
    return None
