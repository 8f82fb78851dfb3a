"""Fits layers on calibration text: one walk through the model for every recipe, which continues where an earlier run stopped.

A recipe says what to do with a layer. The tensors it makes are stored in the fit's folder until the rules write them.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfit import provenance
from upfit.architecture.loading import pick_device
from upfit.calibration.carried import Carried
from upfit.calibration.fit_work import Entry, FitWork
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import run_block
from upfit.calibration.sample import Sample, sample_for
from upfit.calibration.statistics_file import fingerprint
from upfit.calibration.teacher_student import paired_batches
from upfit.checkpoint.plan import Rule
from upfit.checkpoint.reader import torch_dtype

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext

FITTED = "fitted/"  # how rules name tensors of the fit, as opposed to tensors of the checkpoint


@dataclass(frozen=True)
class Calibration:
    """The text of a fit, and the fingerprint of the model that it is for."""

    sample: Sample
    model: str

    def record(self) -> dict[str, Any]:
        """The calibration text, for recipe.json."""
        sample = self.sample
        return {"tokens": sample.tokens, "windows": {n: len(w) for n, w in sample.windows.items()}, **sample.text}


@dataclass(frozen=True)
class LayerFit:
    """What a layer got: `record` for recipe.json, new `tensors` by their names in the checkpoint, `extra` for the plan. Record
    and extra are what JSON can hold."""

    layer: str
    record: dict[str, Any]
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


class Walk:
    """A model that is run layer by layer over the calibration text, side by side with the converted one (`alone`: without
    it)."""

    def __init__(self, context: "FitContext", sample: Sample, alone: bool) -> None:
        pieces, held = sample.batches()
        self.context, self.alone = context, alone
        self.model = LayerwiseModel(context.checkpoint, context.architecture, pieces, pick_device())
        self.batches = list(paired_batches(self.model, held))
        self.carried = Carried(self.batches, alone)

    def pass_by(self, index: int) -> None:
        """Move on through a layer that stays as it is."""
        module = self.model.blocks[index].module
        for batch in self.batches:
            if not self.alone:
                batch.student = run_block(module, batch.student, batch.student_calls[index])
            batch.teacher = run_block(module, batch.teacher, batch.calls[index])


FitLayer = Callable[[int, "Layer"], LayerFit]


@dataclass(frozen=True)
class Task:
    """A fit of some layers. `settings` hold all that results depend on besides model, text and machine. `begin(walk)` gives the
    function that fits the layer at an index, whose weights are loaded, and moves the walk's batches on. `title` stands beside
    the bar with the `note` of a layer's record; `label` is that of the rules."""

    title: str
    label: str
    settings: dict[str, Any]
    layers: "list[Layer]"
    begin: Callable[[Walk], FitLayer]
    note: Callable[[dict[str, Any]], str]
    alone: bool = False


@dataclass(frozen=True)
class Fitted:
    """The fitted layers in the model's order: their entries, and the rules that write their tensors."""

    entries: list[Entry]
    rules: list[Rule]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [entry.record for entry in self.entries]


def read_calibration(context: "FitContext", texts: list[str] | None, tokens: str | None, length: int | None) -> Calibration:
    """The windows of calibration text.

    Raises UpfitError for text that cannot be used, Opaque for a model without a tokenizer.
    """
    if not texts:
        context.output.note(
            "no --calibration text: calibrating on Python's standard library; text like what the model will serve is better"
        )
    return Calibration(
        sample_for(context.folder, context.checkpoint, texts, tokens, length, context.output), fingerprint(context.checkpoint)
    )


def fit_layers(context: "FitContext", calibration: Calibration, task: Task) -> Fitted:
    """Fit every layer of the task; those that an earlier run of the same fit has finished are taken from the folder of the fit.

    Raises Opaque for a model that cannot be run on text.
    """
    work = FitWork(context.scratch, identity(calibration, task))
    done = work.progress
    if done.next:
        context.output.note(f"going on after layer {done.next} of {done.total}")
    with context.output.progress(task.title, len(task.layers)) as meter:
        meter.advance(len(done.layers))
        if not work.finished:
            _walk(context, calibration, task, work, lambda record: meter.advance(1, task.note(record)))
    layers = {layer.path: layer for layer in task.layers}
    rules = [_rule(entry, layers[entry.layer], task.label) for entry in done.layers if entry.names]
    return Fitted(done.layers, rules)


def _walk(
    context: "FitContext", calibration: Calibration, task: Task, work: FitWork, show: Callable[[dict[str, Any]], None]
) -> None:
    """The layers that are still to be done, each kept as soon as it is."""
    walk = Walk(context, calibration.sample, task.alone)
    if work.progress.next:
        walk.carried.restore(work.state())
    fit, blocks = task.begin(walk), walk.model.blocks
    layers = {layer.path: layer for layer in task.layers}
    for index in range(work.progress.next, len(blocks)):
        walk.model.load(index)
        layer = layers.get(blocks[index].attention_path) if blocks[index].attention else None
        if layer is None:
            walk.pass_by(index)
        else:
            fitted = fit(index, layer)
            work.add(index, fitted.layer, fitted.record, fitted.extra, _stored(context, layer, fitted.tensors))
        walk.model.empty(blocks[index].module)
        last = index + 1 == len(blocks)
        carried = None if last else walk.carried.tensors()
        if last or carried is not None:
            work.keep(index + 1, len(blocks), carried)
        if layer is not None:
            show(fitted.record)


def identity(calibration: Calibration, task: Task) -> dict[str, Any]:
    """All that the bytes of a fit depend on."""
    windows = [[len(rows), length, calibration.sample.held[length]] for length, rows in calibration.sample.windows.items()]
    content = b"".join(rows.numpy().tobytes() for rows in calibration.sample.windows.values())
    device = pick_device()
    return {
        "settings": task.settings,
        "layers": [layer.path for layer in task.layers],
        "model": calibration.model,
        "windows": windows,
        "text": hashlib.sha256(content).hexdigest(),
        "versions": provenance.versions(),
        # Sums are taken in an order that depends on these, and differ in their last bits.
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
    }


def _stored(context: "FitContext", layer: "Layer", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's new tensors in the types of the checkpoint (of its queries, where they are new)."""
    known = context.checkpoint.tensors
    types = {name: known[name if name in known else layer.names["q.weight"]].dtype for name in tensors}
    return {FITTED + name: tensor.to("cpu", torch_dtype(types[name])).contiguous() for name, tensor in tensors.items()}


def _rule(entry: Entry, layer: "Layer", label: str) -> Rule:
    """The rule that writes a layer's fitted tensors."""
    # The old output projection is read to say beside which tensor of the checkpoint the new ones are to stand.
    writes = tuple(name.removeprefix(FITTED) for name in entry.names)
    return Rule((*entry.names, layer.names["o.weight"]), writes, _renamed, label)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(FITTED): tensor for name, tensor in tensors.items() if name.startswith(FITTED)}
