"""Differential variants that lose something: chosen and refitted on calibration text, on what the converted model really sees.

Queries, keys and values stay as they are, and what a layer makes of them becomes differential. Then the output projection is
fitted to the teacher's hidden states after the attention, and the last matrix of the MLP to those after the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from upfit.calibration.observe import Opaque, Seen, listening, run_block, run_until
from upfit.calibration.ridge import Moments, ridge_linear
from upfit.calibration.statistics import sample_rows
from upfit.calibration.teacher_student import PairedBatch, add_rows, mlp_end, put, refit_mlp, stream_error
from upfit.calibration.traits import AttentionTraits, probe_attention, watch
from upfit.checkpoint.plan import Plan
from upfit.convert.fitting import LayerFit, Task, Walk, fit_layers, read_calibration

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext

ROWS = 24  # sampled query positions of every 512 of a window
VIEWED = 65_536  # sum of the windows' tokens, once for each stretch of 512 sampled, on which a layer's form is chosen
TOKEN_POWER = 2.0  # a token weighs 1 / rms of the teacher's stream to this power
View = tuple[Seen, Tensor, int]


class Form(Protocol):
    """A layer's differential attention: `outputs` replaces what the attention gives out [B, T, H, V], `start` [E, H·V] is
    where the fit of the output projection begins, `tensors` are stored beside it, `record` is told."""

    def outputs(self, seen: Seen) -> Tensor: ...
    def start(self, weight: Tensor) -> Tensor: ...
    def tensors(self, layer: "Layer") -> dict[str, Tensor]: ...
    def record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Fitting:
    """What to do: `forms(layer, facts, views)` gives the candidates of one layer, of which the one is kept whose output
    projection does best on held-back text; with `refit` False each is taken as it starts. `variant` is the name of `forms`."""

    variant: str
    forms: "Callable[[Layer, AttentionTraits, list[View]], list[Form]]"
    refit: bool = True
    label: str = "fitted on calibration text"


def fit(context: "FitContext", fitting: Fitting, plan: Plan, sources: tuple[list[str] | None, str | None, int | None]) -> Plan:
    """Run both models through the layers and give `plan` rules that read the results, which stand in the folder of the fit.

    Raises UpfitError for calibration text that cannot be used, Opaque for a model that cannot be run on text.
    """
    calibration = read_calibration(context, *sources)
    task = Task(
        title="fitting",
        label=fitting.label,
        settings={"recipe": "diff", "config": plan.config, "variant": fitting.variant, "refit": fitting.refit},
        layers=list(context.architecture.layers),
        begin=lambda walk: lambda index, layer: _convert(walk, index, layer, fitting),
        note=lambda record: f"{record['layer']} stream error {record['stream_error']:.4f}",
    )
    fitted = fit_layers(context, calibration, task)
    report = {"calibration": calibration.record(), "layers": fitted.records}
    return Plan(plan.config, (*plan.rules, *fitted.rules), notes=plan.notes, report=report)


def _convert(walk: Walk, index: int, layer: "Layer", fitting: Fitting) -> LayerFit:
    batches, block, entry = walk.batches, walk.model.blocks[index], walk.context.architecture.entry
    longest = max(batches, key=lambda batch: batch.tokens)
    traits, _ = probe_attention(block, entry, layer.geometry, longest.teacher, longest.calls[index])
    if not traits.values or traits.residual is None:
        raise Opaque(f"{layer.path}: what lies between its attention and the stream is not plain")
    path = f"{block.attention}.{entry.o}"
    projection = block.module.get_submodule(path)
    assert isinstance(projection, nn.Linear)
    views: list[View] = []
    middles, outputs = [], []
    for number, batch in enumerate(batches):
        watched = watch(block, batch.teacher, batch.calls[index], (path,))
        if not batch.held and sum(seen.q.shape[0] * seen.q.shape[2] for seen, _, _ in views) < VIEWED:
            sampled = sample_rows(batch.tokens, ROWS, index, number, batch.teacher.device)
            views += [(watched.seen, rows.at, rows.keys) for rows in sampled]
        middles.append(batch.middle(watched.taps[path][1], traits.residual))
        assert watched.output is not None
        outputs.append(watched.output)
    forms = fitting.forms(layer, traits, views)
    views.clear()
    source = projection.weight
    best: tuple[float, Form, tuple[Tensor, Tensor | None]] | None = None
    for form in forms:
        put(block.module, path, form.start(source))
        sums = {False: Moments(), True: Moments()}
        for batch, middle in zip(batches, middles, strict=True):
            with listening(form.outputs):
                z = run_until(block.module, block.module.get_submodule(path), batch.student, batch.student_calls[index])
            wanted = (middle - batch.student) / traits.residual.attention
            add_rows(sums[batch.held], z, wanted, middle, projection, TOKEN_POWER)
        now = block.module.get_submodule(path)
        assert isinstance(now, nn.Linear)
        solved = ridge_linear(sums, now) if fitting.refit else (now.weight, now.bias)
        full = solved[0] if solved[1] is None else torch.cat([solved[0], solved[1][:, None]], 1)
        error = sums[True].error(full.double())
        if best is None or error < best[0]:
            best = (error, form, solved)
    assert best is not None
    error, form, solved = best
    put(block.module, path, *solved)
    new = {layer.names["o.weight"]: solved[0]} | form.tensors(layer)
    if solved[1] is not None and "o.bias" in layer.names:
        new[layer.names["o.bias"]] = solved[1]
    with listening(form.outputs):
        if fitting.refit:
            new |= _refit_down(walk, index, traits, outputs)
        for batch, output in zip(batches, outputs, strict=True):
            batch.student = run_block(block.module, batch.student, batch.student_calls[index])
            batch.teacher = output
    record = {"layer": layer.path, "attention_error": error, "stream_error": stream_error(batches), **form.record()}
    return LayerFit(layer.path, record, new)


def _refit_down(walk: Walk, index: int, traits: AttentionTraits, outputs: list[Tensor]) -> dict[str, Tensor]:
    """The last matrix of the MLP, where one Linear of the checkpoint is it: put into the layer; its new tensors by name."""
    module, residual = walk.model.blocks[index].module, traits.residual
    end = mlp_end(walk.model, index, module, residual, walk.context.checkpoint)
    if residual is None or end is None:
        return {}
    down, share = module.get_submodule(end.path), residual.mlp

    def rest(_: int, batch: PairedBatch) -> tuple[Tensor, Tensor]:
        call = batch.student_calls[index]
        z = run_until(module, down, batch.student, call)
        return z, run_block(module, batch.student, call) - share * down(z)

    return refit_mlp(module, end, share, walk.batches, outputs, rest, TOKEN_POWER)
