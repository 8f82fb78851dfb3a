"""Runs two models side by side through the same layers: the source, and the converted model as far as it is done."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from upfit.architecture.attention import Layer
from upfit.architecture.layers import Architecture
from upfit.architecture.loading import pick_device
from upfit.architecture.table import Entry
from upfit.calibration.between import OF_DIMENSIONS, OF_HEADS, gates_of
from upfit.calibration.example_sample import ExampleSample
from upfit.calibration.layerwise import Block, LayerwiseModel
from upfit.calibration.observe import Call, Opaque, run_block, run_until, tapped
from upfit.calibration.residual import Residual
from upfit.calibration.ridge import Moments, augmented, ridge_linear
from upfit.calibration.rotation import Turns
from upfit.calibration.sample import Sample
from upfit.calibration.statistics import Rows, sample_rows
from upfit.calibration.traits import AttentionTraits, probe_attention
from upfit.calibration.watch import Place, Watched, watch
from upfit.checkpoint.reader import Checkpoint


@dataclass
class PairedBatch:
    """One batch in both models: hidden states [B, T, E] before the next layer. `counted` [B, T]: False at padding; None where
    there is none."""

    held: bool
    calls: list[Call]
    student_calls: list[Call]
    teacher: Tensor
    student: Tensor
    tokens: int
    counted: Tensor | None = None
    own_positions: bool = False  # as of `ModelInputs`

    def middle(self, attended: Tensor, residual: Residual | None, before: Tensor | None = None) -> Tensor:
        """The teacher's stream [B, T, E] after the attention gave out `attended`; that itself where the stream has another
        form. `before`: the stream that it adds to, where that is not the layer's hidden states."""
        if residual is None:
            return self.teacher if self.teacher.shape == attended.shape else attended
        return (self.teacher if before is None else before) + residual.attention * attended

    def follow(self, index: int) -> None:
        """The student's stream behind layer `index` is the teacher's, with what the layer has left for later ones."""
        self.student = self.teacher
        left, own = (_dictionaries(calls[index]) for calls in (self.calls, self.student_calls))
        for ours, theirs in zip(own, left, strict=True):
            ours.update(theirs)

    def weights(self, stream: Tensor, power: float) -> Tensor:
        """[B, T]: 1 / rms of each token's stream [B, T, E] to `power`; 0 at padding."""
        weights = token_weights(stream, power)
        return weights if self.counted is None else weights * self.counted


def _dictionaries(call: Call) -> list[MutableMapping[Any, Any]]:
    return [value for value in (*call.arguments, *call.keywords.values()) if isinstance(value, MutableMapping)]


def open_pair(
    checkpoint: Checkpoint, architecture: Architecture, sample: Sample | ExampleSample
) -> tuple[LayerwiseModel, list[PairedBatch]]:
    """The source, to be run layer by layer, and the sample's windows before the first layer of both models.

    Raises Opaque for a model that cannot be run on text.
    """
    pieces, held = sample.batches()
    model, batches = LayerwiseModel(checkpoint, architecture, pieces, pick_device()), []
    for batch, back in zip(model.batches, held, strict=True):
        memo: dict[int, Any] = {}

        def own(value: Any, memo: dict[int, Any] = memo) -> Any:
            """Dictionaries that layers write to (keys and values shared between layers) belong to one stream."""
            return memo.setdefault(id(value), copy.copy(value)) if isinstance(value, MutableMapping) else value

        def copied(call: Call, own: Callable[[Any], Any] = own) -> Call:
            keywords = {name: own(value) for name, value in call.keywords.items()}
            return replace(call, arguments=tuple(map(own, call.arguments)), keywords=keywords)

        copies = list(map(copied, batch.calls))
        assert batch.hidden is not None
        hidden, positions = batch.hidden, batch.inputs.own_positions
        counted = None if batch.inputs.counted is None else batch.inputs.counted.to(hidden.device)
        batches.append(PairedBatch(back, batch.calls, copies, hidden, hidden, batch.tokens, counted, positions))
        batch.hidden = None  # a gigabyte where the text is long: it is let go of once both models have moved on
    return model, batches


def enter(index: int, batches: list[PairedBatch]) -> None:
    """Add to both streams what the model itself adds before layer `index`."""
    for batch in batches:
        added, same = batch.calls[index].added, batch.student is batch.teacher
        if added is not None:
            batch.teacher = batch.teacher + added
            batch.student = batch.teacher if same else batch.student + added


def pass_by(module: nn.Module, index: int, batches: list[PairedBatch], alone: bool) -> None:
    """Move on through layer `index`, which stays as it is; `alone`: without the student."""
    for batch in batches:
        if not alone:
            batch.student = run_block(module, batch.student, batch.student_calls[index])
        batch.teacher = run_block(module, batch.teacher, batch.calls[index])


@dataclass(frozen=True)
class LayerPair:
    """Attention `layer` in block `index` of both models before `batches` have gone through it. `student` is the converted
    model's; it may be the teacher's own module, to be changed once the teacher has been watched. `last`: no other attention of
    the block is to be changed after this one."""

    model: LayerwiseModel
    index: int
    layer: Layer
    entry: Entry
    batches: list[PairedBatch]
    student: nn.Module
    last: bool = True

    @property
    def block(self) -> Block:
        """The teacher's layer."""
        return self.model.blocks[self.index]

    @property
    def place(self) -> Place:
        """The attention in the teacher's layer."""
        return Place(self.block, self.layer.path.removeprefix(f"{self.block.path}."), self.entry, self.layer.geometry)

    def path(self, part: str) -> str:
        """Where a part of the attention (`q`, `k_norm`) is in the layer."""
        return self.place.path(part)

    def probe(self) -> tuple[AttentionTraits, Turns]:
        """What may be changed in the layer. Raises Opaque when nothing at all can be said."""
        longest = max(self.batches, key=lambda batch: batch.tokens)
        if longest.calls[self.index].passed_by:
            raise Opaque("what the model is calibrated on does not go through this layer")
        later, own = self.model.blocks[self.index + 1 :], type(self.block.module.get_submodule(self.place.at))
        lent = any(not block.attentions and any(type(m) is own for m in block.module.modules()) for block in later)
        return probe_attention(self.place, longest.teacher, longest.calls[self.index], lent)

    def gates(self, watched: Watched, traits: AttentionTraits) -> Tensor | None:
        """[B, T, H, V] of `between.gates_of`, for a layer that has any. The output projection must have been tapped."""
        return gates_of(watched, self.place) if traits.gated in (OF_HEADS, OF_DIMENSIONS) else None

    def watch(self, taps: tuple[str, ...] = (), rows: int = 0) -> Iterator[tuple[PairedBatch, Watched, list[Rows]]]:
        """The teacher's layer on one batch after the other, and query positions to look at: `rows` of every SEGMENT."""
        for number, batch in enumerate(self.batches):
            watched = watch(self.place, batch.teacher, batch.calls[self.index], taps)
            keys = watched.seen.k.shape[2] if watched.seen.looks_ahead else None
            device = batch.teacher.device
            yield batch, watched, sample_rows(batch.tokens, rows, self.index, number, device, keys, batch.counted)

    def run(self, batch: PairedBatch) -> Tensor:
        """The student's stream [B, T, E] after its layer."""
        return run_block(self.student, batch.student, batch.student_calls[self.index])

    def run_until(self, path: str, batch: PairedBatch) -> Tensor:
        """The input of the module at `path` in the student's layer."""
        return run_until(self.student, self.student.get_submodule(path), batch.student, batch.student_calls[self.index])

    def run_to(self, path: str, batch: PairedBatch, residual: Residual | None) -> tuple[Tensor, Tensor]:
        """The input of the module at `path` in the student's layer, and its stream [B, T, E] before this attention."""
        with tapped({name: self.student.get_submodule(name) for name in taps_before(self.place, residual)}) as taps:
            inputs = self.run_until(path, batch)
        return inputs, stream_before(batch.student, self.place, taps, residual)

    def linear(self, path: str) -> nn.Linear:
        """The Linear at `path` in the student's layer."""
        linear = self.student.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return linear


def taps_before(place: Place, residual: Residual | None) -> tuple[str, ...]:
    """The modules in the layer whose outputs `stream_before` wants."""
    if residual is None:
        return ()
    return place.earlier if not residual.normed else () if residual.base is None else (residual.base,)


def stream_before(hidden: Tensor, place: Place, taps: Mapping[str, tuple[Tensor, Tensor]], residual: Residual | None) -> Tensor:
    """The stream [B, T, E] that an attention adds to: the layer's `hidden` and what its earlier attentions have added, or what
    a norm has made of that. The hidden states themselves where the layer adds in another way. `taps` hold (input, output)."""
    if residual is None:
        return hidden
    if residual.normed:
        return hidden if residual.base is None else taps[residual.base][1]
    for factor, name in zip(residual.earlier, place.earlier, strict=True):
        hidden = hidden + factor * taps[name][1]
    return hidden


def token_weights(stream: Tensor, power: float) -> Tensor:
    """[B, T]: 1 / rms of each token's stream to `power`."""
    return stream.square().mean(-1).clamp_min(1e-12) ** (-power / 2)


def row_sums(
    linear: nn.Linear,
    batches: list[PairedBatch],
    rows: Callable[[int, PairedBatch], tuple[Tensor, Tensor, Tensor]],
    power: float,
) -> dict[bool, Moments]:
    """The sums that a refit of `linear` takes, by whether the rows are held back.

    `rows` gives of a batch what the Linear is given [B, T, Z], what it should give out [B, T, E], and the stream [B, T, E] that
    weighs its tokens: 1 / rms to `power`.
    """
    sums = {False: Moments(), True: Moments()}
    for number, batch in enumerate(batches):
        z, wanted, stream = rows(number, batch)
        inputs = augmented(z.flatten(0, 1), z.shape[-1] + (linear.bias is not None))
        sums[batch.held].add(inputs, wanted.flatten(0, 1), batch.weights(stream, power).flatten())
    return sums


def put(module: nn.Module, path: str, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give the module at `path` in `module` this weight and bias."""
    target = module.get_submodule(path)
    target._parameters["weight"] = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    if bias is not None:
        target._parameters["bias"] = nn.Parameter(bias.float().contiguous(), requires_grad=False)


@dataclass(frozen=True)
class MlpEnd:
    """The Linear that ends a layer's MLP: its path in the layer, and the names of its weight and bias in the checkpoint."""

    path: str
    names: tuple[str, str | None]


def mlp_end(pair: LayerPair, residual: Residual | None) -> MlpEnd | None:
    """The end of the MLP in the student's layer; None where one Linear of the checkpoint is not it."""
    if residual is None or residual.down is None:
        return None
    linear, weights = pair.student.get_submodule(residual.down), pair.model.weights
    names = [weights.sources.get(f"{pair.block.path}.{residual.down}.{kind}") for kind in ("weight", "bias")]
    if not isinstance(linear, nn.Linear) or not _is_plain(names, linear, weights.checkpoint) or names[0] is None:
        return None
    return MlpEnd(residual.down, (names[0][0], names[1][0] if names[1] else None))


def _is_plain(names: list[list[str] | None], module: nn.Linear, checkpoint: Checkpoint) -> bool:
    """Each of the module's parameters is one tensor of the checkpoint, as it is."""
    for stored, parameter in zip(names, (module.weight, module.bias), strict=True):
        if parameter is not None and (stored is None or len(stored) != 1):
            return False
        if parameter is not None and stored and checkpoint.tensors[stored[0]].shape != tuple(parameter.shape):
            return False
    return True


def refit_mlp(
    module: nn.Module,
    end: MlpEnd,
    share: float,
    batches: list[PairedBatch],
    outputs: list[Tensor],
    rest: Callable[[int, PairedBatch], tuple[Tensor, Tensor]],
    power: float,
) -> dict[str, Tensor]:
    """Fit the Linear that ends the student's MLP to the teacher's `outputs` [B, T, E] of the layer; the new tensors by name.

    `rest` gives, of a batch, the Linear's inputs [B, T, Z] and the student's stream after the layer without what it adds:
    `share` times its output. A token weighs 1 / rms of the teacher's stream to `power`.
    """
    linear = module.get_submodule(end.path)
    assert isinstance(linear, nn.Linear)

    def rows(number: int, batch: PairedBatch) -> tuple[Tensor, Tensor, Tensor]:
        z, without = rest(number, batch)
        return z, (outputs[number] - without) / share, outputs[number]

    solved = ridge_linear(row_sums(linear, batches, rows, power), linear)
    put(module, end.path, *solved)
    return {name: tensor for name, tensor in zip(end.names, solved, strict=True) if name and tensor is not None}


def stream_error(batches: list[PairedBatch]) -> float:
    """|student − teacher|² / |teacher|², mean over held-back tokens."""
    shares = []
    for batch in batches:
        if batch.held:
            lost, power = ((x).square().sum(-1) for x in (batch.student - batch.teacher, batch.teacher))
            share = lost / power.clamp_min(1e-12)
            shares.append(share.flatten() if batch.counted is None else share[batch.counted])
    return float(torch.cat(shares).mean())
