"""Sums up the statistics of one attention layer over calibration text."""

from dataclasses import dataclass

from torch import Tensor

from upfit.architecture.layers import Architecture
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import Opaque
from upfit.calibration.statistics import ROWS, add, observe
from upfit.calibration.teacher_student import LayerPair, PairedBatch, enter, pass_by
from upfit.calibration.traits import AttentionTraits


@dataclass(frozen=True)
class LayerSums:
    """One attention layer: its traits and float32 statistics, or why it could not be watched."""

    path: str
    traits: AttentionTraits | str
    sums: dict[str, Tensor]


def gather_layer(model: LayerwiseModel, architecture: Architecture, index: int, batches: list[PairedBatch]) -> list[LayerSums]:
    """Run one layer over the teacher's batches, which move on; the statistics of each of its attentions that has key/value
    heads."""
    block = model.blocks[index]
    model.load(index)
    enter(index, batches)
    paths = {f"{block.path}.{attention}" for attention in block.attentions}
    own = [layer for layer in architecture.layers if layer.path in paths]
    results, outputs = [], list[Tensor]()
    for layer in own:
        sums, outputs = _gather(LayerPair(model, index, layer, architecture.entry, batches, block.module))
        results.append(sums)
    if outputs:
        for batch, output in zip(batches, outputs, strict=True):
            batch.teacher = output
    else:
        pass_by(block.module, index, batches, alone=True)
    model.empty(block.module)
    return results


def _gather(pair: LayerPair) -> tuple[LayerSums, list[Tensor]]:
    """The statistics of an attention and the layer's outputs; none of both where it cannot be watched."""
    try:
        traits, _ = pair.probe()
    except Opaque as reason:
        return LayerSums(pair.layer.path, str(reason), {}), []
    sums: dict[str, Tensor] = {}
    outputs = []
    for batch, watched, rows in pair.watch((pair.path("o"),), ROWS):
        if not batch.held:
            add(sums, observe(watched.seen, traits, rows, pair.gates(watched, traits)))
        outputs.append(watched.output)
    stored = {name: tensor.float().cpu().contiguous() for name, tensor in sums.items()}
    return LayerSums(pair.layer.path, traits, stored), outputs
