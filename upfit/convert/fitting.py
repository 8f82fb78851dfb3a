"""Fits layers on calibration text: one walk through the model for every recipe, which continues where an earlier run stopped.

A recipe says what to do with a layer: the body of a loop over `LayerFits`. The tensors that it stores there lie in the fit's
folder until the rules write them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfit import provenance
from upfit.architecture.loading import multiplies_bfloat16_fast, pick_device
from upfit.calibration.carried import Carried
from upfit.calibration.example_sample import ExampleSample
from upfit.calibration.fit_work import Entry, FitWork
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import Opaque
from upfit.calibration.sample import Sample
from upfit.calibration.sample_for import sample_for
from upfit.calibration.statistics_file import fingerprint
from upfit.calibration.teacher_student import LayerPair, PairedBatch, enter, open_pair, pass_by
from upfit.checkpoint.plan import Rule
from upfit.checkpoint.reader import torch_dtype
from upfit.examples.kinds import kind_of
from upfit.text.files import FIELD

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext

FITTED = "fitted/"  # how rules name tensors of the fit, as opposed to tensors of the checkpoint


@dataclass(frozen=True)
class Calibration:
    """The text of a fit, and the fingerprint of the model that it is for."""

    sample: Sample | ExampleSample
    model: str

    def record(self) -> dict[str, Any]:
        """The calibration text, for recipe.json."""
        return self.sample.record()


def read_calibration(
    context: "FitContext", texts: list[str] | None, tokens: str | None, length: int | None, field: str = FIELD
) -> Calibration:
    """The windows of calibration text, which is in `field` where a file has fields.

    Raises UpfitError for text that cannot be used, Opaque for a model without a tokenizer.
    """
    if not texts and kind_of(context.checkpoint.config) == "text":
        context.output.note(
            "no --calibration text: calibrating on Python's standard library; text like what the model will serve is better"
        )
    sample = sample_for(context.folder, context.checkpoint, texts, tokens, length, context.output, field)
    return Calibration(sample, fingerprint(context.checkpoint))


@dataclass
class LayerFits:
    """A fit of `layers` of the model. A loop over it runs the model over the calibration text and gives each of these layers in
    turn, with its weights loaded; its body changes the layer, moves `pair.batches` on (with the `last` attention of a block)
    and calls `store`. Layers that an earlier run of the same fit has finished are taken from the folder of the fit.

    `settings` hold all that results depend on besides model, text and machine. `title` stands beside the bar. `alone`: there is
    no converted model beside the teacher. `several`: the body takes layers with more than one attention. A loop raises Opaque
    for a model that cannot be run on what is there.
    """

    context: "FitContext"
    calibration: Calibration
    title: str
    settings: dict[str, Any]
    layers: "list[Layer]"
    alone: bool = False
    several: bool = False

    def __post_init__(self) -> None:
        self._work = FitWork(self.context.scratch, identity(self.calibration, self.settings, self.layers))
        self._note = ""

    def __iter__(self) -> Iterator[LayerPair]:
        work, done = self._work, self._work.progress
        if done.next:
            self.context.output.note(f"going on after layer {done.next} of {done.total}")
        with self.context.output.progress(self.title, len(self.layers)) as meter:
            meter.start_at(len(done.layers))
            if work.finished:
                return
            model, batches, carried = self._open()
            entry, blocks = self.context.architecture.entry, model.blocks
            for index in range(done.next, len(blocks)):
                model.load(index)
                enter(index, batches)
                own = [f"{blocks[index].path}.{attention}" for attention in blocks[index].attentions]
                layers = [layer for layer in self.layers if layer.path in own]
                for layer in layers:
                    last = layer is layers[-1]
                    yield LayerPair(model, index, layer, entry, batches, blocks[index].module, last)
                    assert done.layers and done.layers[-1].layer == layer.path, "the loop's body stores what the layer got"
                if not layers:
                    pass_by(blocks[index].module, index, batches, self.alone)
                model.empty(blocks[index].module)
                last = index + 1 == len(blocks)
                state = None if last else carried.tensors()
                if last or state is not None:
                    work.keep(index + 1, len(blocks), state)
                if layers:
                    meter.advance(len(layers), self._note)

    def decided(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the fit settles once, before its first layer: what an earlier run of it decided, or `decide` now; JSON can hold
        it."""
        if self._work.progress.decided is None:
            self._work.settle(decide())
        assert self._work.progress.decided is not None
        return self._work.progress.decided

    def _open(self) -> tuple[LayerwiseModel, list[PairedBatch], Carried]:
        """Both models, before the first layer that is still to be done."""
        model, batches = open_pair(self.context.checkpoint, self.context.architecture, self.calibration.sample)
        if not self.several and any(len(block.attentions) > 1 for block in model.blocks):
            raise Opaque("a layer of it has more than one attention")
        carried = Carried(batches, self.alone)
        if self._work.progress.next:
            carried.restore(self._work.state())
        return model, batches, carried

    def store(
        self,
        pair: LayerPair,
        record: dict[str, Any],
        tensors: dict[str, Tensor],
        extra: dict[str, Any] | None = None,
        note: str = "",
    ) -> None:
        """What a layer got: `record` for recipe.json, new `tensors` by their names in the checkpoint, `extra` for the plan.
        Record and extra are what JSON can hold. `note` stands beside the bar after the layer's path."""
        path, known = pair.layer.path, self.context.checkpoint.tensors
        # In the types of the checkpoint (of the layer's queries, where they are new).
        types = {name: known[name if name in known else pair.layer.names["q.weight"]].dtype for name in tensors}
        ready = {FITTED + name: tensor.to("cpu", torch_dtype(types[name])).contiguous() for name, tensor in tensors.items()}
        self._work.add(path, record, extra or {}, ready)
        self._note = f"{path} {note}".rstrip()

    @property
    def entries(self) -> list[Entry]:
        """The fitted layers, in the model's order."""
        return self._work.progress.layers

    @property
    def records(self) -> list[dict[str, Any]]:
        return [entry.record for entry in self.entries]

    def rules(self, label: str, dropped: "Callable[[Layer], tuple[str, ...]]" = lambda layer: ()) -> tuple[Rule, ...]:
        """The rules that write the fitted tensors, and leave out those that a layer has `dropped`."""
        layers = {layer.path: layer for layer in self.layers}
        chosen = [(entry, layers[entry.layer]) for entry in self.entries if entry.names]
        return tuple(_rule(entry, layer, label, dropped(layer)) for entry, layer in chosen)


def identity(calibration: Calibration, settings: dict[str, Any], layers: "list[Layer]") -> dict[str, Any]:
    """All that the bytes of a fit depend on."""
    device = pick_device()
    return {
        "settings": settings,
        "layers": [layer.path for layer in layers],
        "model": calibration.model,
        **calibration.sample.identity(),
        "versions": provenance.versions(),
        # Sums are taken in an order that depends on these, and differ in their last bits.
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "quick_products": multiplies_bfloat16_fast(torch.device(device)),
    }


def _rule(entry: Entry, layer: "Layer", label: str, dropped: tuple[str, ...]) -> Rule:
    """The rule that writes a layer's fitted tensors."""
    # The old output projection is read to say beside which tensor of the checkpoint the new ones are to stand.
    writes = tuple(name.removeprefix(FITTED) for name in entry.names)
    gone = tuple(name for name in dropped if name not in writes)
    return Rule((*entry.names, layer.names["o.weight"]), writes, _renamed, label, gone)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(FITTED): tensor for name, tensor in tensors.items() if name.startswith(FITTED)}
