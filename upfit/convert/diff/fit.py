"""Differential variants that lose something: chosen and refitted on calibration text, on what the converted model really sees.

Queries, keys and values stay as they are, and what a layer makes of them becomes differential. Then the output projection is
fitted to the teacher's hidden states after the attention, and the last matrix of the MLP to those after the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from upfit.calibration.observe import Opaque, Seen, listening
from upfit.calibration.residual import Residual
from upfit.calibration.ridge import ridge_linear
from upfit.calibration.teacher_student import LayerPair, PairedBatch, mlp_end, put, refit_mlp, row_sums, stream_error
from upfit.calibration.traits import AttentionTraits
from upfit.checkpoint.plan import Plan
from upfit.convert.fitting import LayerFits, read_calibration

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext

ROWS = 24  # sampled query positions of every 512 of a window
VIEWED = 65_536  # sum of the windows' tokens, once for each stretch of 512 sampled, on which a layer's form is chosen
TOKEN_POWER = 2.0  # a token weighs 1 / rms of the teacher's stream to this power
LABEL = "fitted on calibration text"
View = tuple[Seen, Tensor, int]


class Form(Protocol):
    """A layer's differential attention: `outputs` replaces what the attention gives out [B, T, H, V], `start` [E, H·V] is
    where the fit of the output projection begins, `tensors` are stored beside it, `record` goes into recipe.json."""

    def outputs(self, seen: Seen) -> Tensor: ...
    def start(self, weight: Tensor) -> Tensor: ...
    def tensors(self, layer: "Layer") -> dict[str, Tensor]: ...
    def record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Fitting:
    """What to do: `forms(layer, traits, views)` gives the candidates of one layer, of which the one is kept whose output
    projection does best on held-back text; with `refit` False each is taken as it starts. `variant` is the name of `forms`."""

    variant: str
    forms: "Callable[[Layer, AttentionTraits, list[View]], list[Form]]"
    refit: bool = True


def fit(
    context: "FitContext", fitting: Fitting, plan: Plan, sources: tuple[list[str] | None, str | None, int | None, str]
) -> Plan:
    """Run both models through the layers and give `plan` rules that read the results, which stand in the folder of the fit.

    Raises UpfitError for calibration text that cannot be used, Opaque for a model that cannot be run on text.
    """
    calibration = read_calibration(context, *sources)
    settings = {"recipe": "diff", "config": plan.config, "variant": fitting.variant, "refit": fitting.refit}
    fits = LayerFits(context, calibration, "fitting", settings, list(context.architecture.layers))
    for pair in fits:
        record, tensors = _convert(pair, fitting)
        fits.store(pair, record, tensors, note=f"stream error {record['stream_error']:.4f}")
    report = {"calibration": calibration.record(), "layers": fits.records}
    return Plan(plan.config, (*plan.rules, *fits.rules(LABEL)), notes=plan.notes, report=report)


def _convert(pair: LayerPair, fitting: Fitting) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The layer with its best form and all that is refitted, through which both streams move: its record and new tensors."""
    layer, path = pair.layer, pair.path("o")
    traits, _ = pair.probe()
    if not traits.values or traits.residual is None:
        raise Opaque(f"{layer.path}: what lies between its attention and the stream is not plain")
    views: list[View] = []
    middles, outputs = [], []
    for batch, watched, rows in pair.watch((path,), ROWS):
        if not batch.held and sum(seen.q.shape[0] * seen.q.shape[2] for seen, _, _ in views) < VIEWED:
            views += [(watched.seen, sampled.at, sampled.keys) for sampled in rows]
        middles.append(batch.middle(watched.taps[path][1], traits.residual))
        outputs.append(watched.output)
    forms = fitting.forms(layer, traits, views)
    views.clear()
    error, form, (weight, bias) = _best(pair, forms, middles, traits.residual, fitting.refit)
    put(pair.student, path, weight, bias)
    new = {layer.names["o.weight"]: weight} | form.tensors(layer)
    if bias is not None and "o.bias" in layer.names:
        new[layer.names["o.bias"]] = bias
    with listening(form.outputs):
        if fitting.refit:
            new |= _refit_mlp(pair, traits.residual, outputs)
        for batch, output in zip(pair.batches, outputs, strict=True):
            batch.student = pair.run(batch)
            batch.teacher = output
    errors = {"attention_error": error, "stream_error": stream_error(pair.batches)}
    return {"layer": layer.path, **errors, **form.record()}, new


def _best(
    pair: LayerPair, forms: list[Form], middles: list[Tensor], residual: Residual, refit: bool
) -> tuple[float, Form, tuple[Tensor, Tensor | None]]:
    """The form that does best on held-back rows, with its error there and its output projection: fitted to the teacher's stream
    after the attention, `middles`."""
    path = pair.path("o")
    projection = pair.linear(path)
    source = projection.weight

    def fitted(form: Form) -> tuple[float, Form, tuple[Tensor, Tensor | None]]:
        def rows(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor, Tensor]:
            with listening(form.outputs):
                z = pair.run_until(path, batch)
            return z, (middles[number] - batch.student) / residual.attention, middles[number]

        put(pair.student, path, form.start(source))
        sums = row_sums(projection, pair.batches, rows, TOKEN_POWER)
        weight, bias = ridge_linear(sums, projection) if refit else (projection.weight, projection.bias)
        full = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        return sums[True].error(full.double()), form, (weight, bias)

    return min(map(fitted, forms), key=lambda result: result[0])


def _refit_mlp(pair: LayerPair, residual: Residual, outputs: list[Tensor]) -> dict[str, Tensor]:
    """The last matrix of the MLP, where one Linear of the checkpoint is it: put into the layer; its new tensors by name."""
    end = mlp_end(pair, residual)
    if end is None:
        return {}
    down = pair.linear(end.path)

    def rest(_: int, batch: PairedBatch) -> tuple[Tensor, Tensor]:
        z = pair.run_until(end.path, batch)
        return z, pair.run(batch) - residual.mlp * down(z)

    return refit_mlp(pair.student, end, residual.mlp, pair.batches, outputs, rest, TOKEN_POWER)
