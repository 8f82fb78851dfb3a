"""Differential variants that lose something: chosen and refitted on calibration text, in the converted model's own stream.

Queries, keys and values stay as they are. What a layer makes of them becomes differential; then the output projection is
fitted to the teacher's stream after the attention, and the last matrix of the MLP to its stream after the layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from upfit.convert.calibrate import pick_device, sample_for
from upfit.convert.facts import Facts, understand, watch
from upfit.convert.fitted import keep, note_default_text, told_of
from upfit.convert.lanes import Lane, add_rows, is_plain, lanes_of, put, stream_error
from upfit.convert.recipe import Plan
from upfit.convert.ridge import Moments, ridge_linear
from upfit.convert.statistics import sample_rows
from upfit.convert.stream import Opaque, Seen, Stream, listening, run_block, run_until

if TYPE_CHECKING:
    from upfit.convert.attention import Layer
    from upfit.convert.recipe import Bench

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
    projection does best on held-back text; with `refit` False each is taken as it starts."""

    forms: "Callable[[Layer, Facts, list[View]], list[Form]]"
    refit: bool = True
    label: str = "fitted on calibration text"


def fit(bench: "Bench", fitting: Fitting, plan: Plan, sources: tuple[list[str] | None, str | None, int | None]) -> Plan:
    """Run both models through the layers and give `plan` rules that read the results, which stand in the bench's folder.

    Raises UpfitError for calibration text that cannot be used, Opaque for a model that cannot be run on text.
    """
    if not sources[0]:
        note_default_text(bench)
    sample = sample_for(bench.folder, bench.checkpoint, *sources, bench.output)
    pieces, held = sample.batches()
    stream = Stream(bench.checkpoint, bench.architecture, pieces, pick_device())
    told, rules = [], list(plan.rules)
    with bench.output.progress("fitting", len(bench.architecture.layers)) as meter:
        for layer, record, tensors in _layers(bench, stream, held, fitting):
            told.append(record)
            rules.append(keep(bench, layer, tensors, fitting.label))
            meter.advance(1, f"{layer.path} stream error {record['stream_error']:.4f}")
    report = {"calibration": told_of(sample), "layers": told}
    return Plan(plan.config, tuple(rules), notes=plan.notes, report=report)


def _layers(
    bench: "Bench", stream: Stream, held: list[bool], fitting: Fitting
) -> "Iterator[tuple[Layer, dict[str, Any], dict[str, Tensor]]]":
    lanes = list(lanes_of(stream, held))
    layers = {layer.path: layer for layer in bench.architecture.layers}
    for index, block in enumerate(stream.blocks):
        stream.load(index)
        layer = layers.get(block.attention_path) if block.attention else None
        if layer is None:
            for lane in lanes:
                lane.student = run_block(block.module, lane.student, lane.student_calls[index])
                lane.teacher = run_block(block.module, lane.teacher, lane.calls[index])
        else:
            yield (layer, *_convert(bench, stream, index, layer, lanes, fitting))
        stream.empty(block.module)


def _convert(
    bench: "Bench", stream: Stream, index: int, layer: "Layer", lanes: list[Lane], fitting: Fitting
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    block, entry = stream.blocks[index], bench.architecture.entry
    longest = max(lanes, key=lambda lane: lane.tokens)
    facts, _ = understand(block, entry, layer.geometry, longest.teacher, longest.calls[index])
    if not facts.values or facts.residual is None:
        raise Opaque(f"{layer.path}: what lies between its attention and the stream is not plain")
    path = f"{block.attention}.{entry.o}"
    projection = block.module.get_submodule(path)
    assert isinstance(projection, nn.Linear)
    views: list[View] = []
    middles, outputs = [], []
    for number, lane in enumerate(lanes):
        watched = watch(block, lane.teacher, lane.calls[index], (path,))
        if not lane.held and sum(seen.q.shape[0] * seen.q.shape[2] for seen, _, _ in views) < VIEWED:
            some = sample_rows(lane.tokens, ROWS, index, number, lane.teacher.device)
            views += [(watched.seen, rows.at, rows.keys) for rows in some]
        middles.append(lane.middle(watched.taps[path][1], facts.residual))
        assert watched.output is not None
        outputs.append(watched.output)
    forms = fitting.forms(layer, facts, views)
    views.clear()
    source = projection.weight
    best: tuple[float, Form, tuple[Tensor, Tensor | None]] | None = None
    for form in forms:
        put(block.module, path, form.start(source))
        sums = {False: Moments(), True: Moments()}
        for lane, middle in zip(lanes, middles, strict=True):
            with listening(form.outputs):
                z = run_until(block.module, block.module.get_submodule(path), lane.student, lane.student_calls[index])
            wanted = (middle - lane.student) / facts.residual.attention
            add_rows(sums[lane.held], z, wanted, middle, projection, TOKEN_POWER)
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
            _refit_down(bench, stream, index, facts, lanes, outputs, new)
        for lane, output in zip(lanes, outputs, strict=True):
            lane.student = run_block(block.module, lane.student, lane.student_calls[index])
            lane.teacher = output
    record = {"layer": layer.path, "attention_error": error, "stream_error": stream_error(lanes), **form.record()}
    return record, new


def _refit_down(
    bench: "Bench",
    stream: Stream,
    index: int,
    facts: Facts,
    lanes: list[Lane],
    outputs: list[Tensor],
    new: dict[str, Tensor],
) -> None:
    """The last matrix of the MLP, where one Linear of the checkpoint is it; put into the layer and added to `new`."""
    residual, block = facts.residual, stream.blocks[index]
    if residual is None or residual.down is None:
        return
    down = block.module.get_submodule(residual.down)
    names = [stream.weights.sources.get(f"{block.path}.{residual.down}.{kind}") for kind in ("weight", "bias")]
    if not isinstance(down, nn.Linear) or not is_plain(names, down, bench.checkpoint):
        return
    sums = {False: Moments(), True: Moments()}
    for lane, output in zip(lanes, outputs, strict=True):
        call = lane.student_calls[index]
        z = run_until(block.module, down, lane.student, call)
        without = run_block(block.module, lane.student, call) - residual.mlp * down(z)
        add_rows(sums[lane.held], z, (output - without) / residual.mlp, output, down, TOKEN_POWER)
    solved = ridge_linear(sums, down)
    put(block.module, residual.down, *solved)
    for name, tensor in zip(names, solved, strict=True):
        if name and tensor is not None:
            new[name[0]] = tensor
