"""Latent attention for a whole model, layer by layer.

Two models run side by side through the same layers: the teacher and the converted one. At each layer the teacher is watched
and summed up (`sums.py`), and its attention is replaced in closed form (`layer.py`). Then, with `refit`, on what the converted
model really sees: queries, rotated keys and the latent are fitted to the teacher's scores (`calibration/scores`), where a
change of the latent also costs what it does to the values; then the output projection and the last matrix of the MLP to the
teacher's stream (`calibration/stream_refit.py`). Balance, steps and ridges are chosen on held-back windows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.attention import LAYOUTS, Attention
from upfit.calibration.layerwise import Block, find_blocks, observed_model
from upfit.calibration.observe import Call, Opaque
from upfit.calibration.ridge import augmented
from upfit.calibration.rotation import Turns
from upfit.calibration.scores.fit import Effort, Penalty, fit_scores
from upfit.calibration.scores.problem import Batch, Form, Weights, input_moments
from upfit.calibration.stream_refit import adopt, drifts_of, mapped, refit_stream
from upfit.calibration.teacher_student import LayerPair, put, stream_error
from upfit.calibration.traits import AttentionTraits
from upfit.convert.fitting import LayerFits
from upfit.convert.mla.layer import Latent, even
from upfit.convert.mla.own_config import written
from upfit.convert.mla.refine import refine
from upfit.convert.mla.sizes import Sizes, layer_settings, without_rotation
from upfit.convert.mla.watch_layer import BALANCES, Shown, check_projections, closest, watch_layer


@dataclass(frozen=True)
class Settings:
    """`refit`: fit in the converted stream, not only replace."""

    sizes: Sizes
    refit: bool = True
    effort: Effort = Effort()
    token_power: float = 2.0  # a token weighs 1 / rms of the teacher's stream to this power


@dataclass
class LayerRecord:
    """What happened to one layer, for recipe.json. Errors are shares of the teacher's energy, held back."""

    layer: str
    settings: dict[str, Any]  # of the layer, in the config of our class
    scaling: float
    balance: float
    cut: int | None  # the pair from which keys are mixed as if they did not turn, where that was better
    output_error: float  # of what the attention gives out, after the closed form
    fitted_before: float | None = None  # of the scores, before and after the fit
    fitted_after: float | None = None
    stream_error: float | None = None  # |student − teacher|² / |teacher|² of the hidden states, mean over tokens


Config = Callable[[list[dict[str, Any]], float], dict[str, Any]]  # settings of layers and scaling → config of our class


def convert_layers(fits: LayerFits, config: Config, settings: Settings) -> None:
    """Replace the attention of every layer of `fits`."""
    known: tuple[dict[str, Any], float] | None = None
    students: list[Block] = []
    for pair in fits:
        traits, turns = pair.probe()
        _check(pair, traits, settings.sizes)
        shown = watch_layer(pair, traits, turns, _attention(pair))
        sizes = settings.sizes
        if not traits.pairs and sizes.counts:
            sizes = without_rotation(sizes, pair.layer.geometry, shown.source.q.shape[-1])
        own = layer_settings(sizes, rotation_columns(pair.batches[0].calls[pair.index], turns))
        if known != (own, shown.source.scaling):  # as a rule once: layers are alike
            known = own, shown.source.scaling
            model = observed_model(config([own] * len(fits.layers), known[1]), str(pair.batches[0].teacher.device))
            students = find_blocks(model, fits.context.architecture)
        student = students[pair.index].module
        adopt(student, pair.block.module)
        record, tensors = _convert(replace(pair, student=student), traits, shown, own, replace(settings, sizes=sizes))
        pair.model.empty(student)
        fits.store(pair, asdict(record), tensors, note=f"output error {record.output_error:.3f}")


def _attention(pair: LayerPair) -> Attention:
    """The layer's attention as it is stored, on the device of the batches."""
    device = pair.batches[0].teacher.device
    stored = {part: pair.model.weights.checkpoint.read(name).float() for part, name in pair.layer.names.items()}
    return LAYOUTS[pair.layer.layout].unpack({part: tensor.to(device) for part, tensor in stored.items()}, pair.layer.geometry)


def _check(pair: LayerPair, traits: AttentionTraits, sizes: Sizes) -> None:
    """Raise Opaque for a layer that cannot be given a latent, with the reason."""
    check_projections(pair, traits)
    if traits.pairs and traits.pairs != len(sizes.counts):
        raise Opaque(f"{pair.layer.path} rotates {traits.pairs} pairs of dimensions, where {len(sizes.counts)} were expected")
    if not pair.last or len(pair.block.attentions) > 1:
        raise Opaque(f"{pair.layer.path} is not the only attention of its layer")


def rotation_columns(call: Call, turns: Turns) -> list[int]:
    """For each pair (fastest first) the column of the family's cosines and sines that turns it. Raises Opaque where there is
    none."""
    count = turns.k.shape[1]
    if not count:
        return []
    for value in (*call.keywords.values(), *call.arguments):
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) and part.ndim == 3 for part in value):
            cos, sin = (part[0].double() for part in value)
            seen = turns.k[: len(cos)]  # of the longest windows
            columns = [_column(seen[:, pair], cos[: len(seen)], sin[: len(seen)]) for pair in range(count)]
            if all(column is not None for column in columns):
                return [column for column in columns if column is not None]
    raise Opaque("its attention is not given cosines and sines by which its keys turn")


def _column(turn: Tensor, cos: Tensor, sin: Tensor) -> int | None:
    gaps = (cos - turn.real.double()[:, None]).abs().amax(0) + (sin - turn.imag.double()[:, None]).abs().amax(0)
    best = int(gaps.argmin())
    return best if float(gaps[best]) < 1e-3 else None


def _convert(
    pair: LayerPair, traits: AttentionTraits, shown: Shown, own: dict[str, Any], settings: Settings
) -> tuple[LayerRecord, dict[str, Tensor]]:
    """The layer's record and new tensors; both streams move on."""
    chosen, views = closest(shown, settings.sizes, BALANCES), shown.views
    record = LayerRecord(pair.layer.path, own, shown.source.scaling, chosen.balance, chosen.cut, chosen.error)
    latent = _fit(pair, traits, chosen.latent, shown, settings, record) if settings.refit else chosen.latent
    new = _put(pair, latent)
    for view in views:
        view.targets.clear()
    if settings.refit:
        new |= refit_stream(pair, traits, views, settings.token_power)
    for view in views:
        view.batch.teacher = view.output
        if not settings.refit:
            view.batch.student = view.output
    record.stream_error = stream_error(pair.batches) if settings.refit else None
    return record, new


def _fit(
    pair: LayerPair, traits: AttentionTraits, latent: Latent, shown: Shown, settings: Settings, record: LayerRecord
) -> Latent:
    """The layer on what the student sees, queries and keys fitted to the teacher's scores."""
    path, views, turns = f"{pair.place.at}.q_proj", shown.views, shown.turns
    latent = refine(latent, shown, traits, settings.sizes, record.balance, settings.token_power)
    inputs = [pair.run_until(path, view.batch) for view in views]
    drift, _ = drifts_of([(x, x) for x in inputs], views)
    latent = replace(latent, q=mapped(latent.q, drift), key=mapped(latent.key, drift))
    width, slots = latent.key.shape[-1], list(latent.slots)
    problems: dict[bool, list[Batch]] = {False: [], True: []}
    for x, view in zip(inputs, views, strict=True):
        problems[view.batch.held].append(Batch(augmented(x, width), view.targets))
    form = Form(
        Turns(turns.q[:, slots], turns.k[:, slots]),
        latent.absorbed,
        None,
        len(latent.q),
        1,
        len(latent.key),
        record.scaling,
        q_width=latent.q.shape[1],
    )
    start = Weights(latent.q.flatten(0, 1), latent.key)
    moments = input_moments(problems[False], width, width)
    penalty = _penalty(latent, shown)
    result = fit_scores(problems[False], problems[True], form, start, *moments, settings.effort, penalty)
    record.fitted_before, record.fitted_after = result.before, result.after
    return even(replace(latent, q=result.weights.q.unflatten(0, (len(latent.q), -1)), key=result.weights.k), shown.sums)


def _penalty(latent: Latent, shown: Shown) -> Penalty:
    """What a change of the latent costs the values: Σ_h tr (O_h U_V)ᵀ(O_h U_V) Δ C_V Δᵀ, in units of the scores' errors."""
    read = torch.einsum("ehv,hvr->her", latent.o, latent.of_heads(latent.up_v))
    metric = torch.nn.functional.pad(torch.einsum("her,hes->rs", read, read), (latent.rotated, 0, latent.rotated, 0))
    units = [target.unit for view in shown.views if not view.batch.held for target in view.targets]
    unit = len(latent.q) * sum(units) / len(units)
    return Penalty(metric, shown.sums["values"].to(metric.device) / max(unit, 1e-30))


def _put(pair: LayerPair, latent: Latent) -> dict[str, Tensor]:
    """Put the layer into the student; its tensors by name."""
    width, rotated = pair.batches[0].teacher.shape[-1], latent.rotated
    q = torch.cat([latent.q[:, rotated:], latent.q[:, :rotated]], 1).flatten(0, 1)
    key = torch.cat([latent.key[rotated:], latent.key[:rotated]])
    up = torch.cat([latent.up_k, latent.up_v], 1).flatten(0, 1)
    biased = latent.key.shape[-1] > width
    put(pair.student, f"{pair.place.at}.q_proj", q[:, :width], q[:, width] if biased else None)
    put(pair.student, f"{pair.place.at}.kv_a_proj_with_mqa", key[:, :width], key[:, width] if biased else None)
    put(pair.student, f"{pair.place.at}.kv_b_proj", up)
    tensors = [q[:, :width], key[:, :width], up] + ([q[:, width], key[:, width]] if biased else [])
    return dict(zip(written(pair.layer, biased), tensors, strict=True))
