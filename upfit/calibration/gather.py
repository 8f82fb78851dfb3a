"""Sums up the statistics of one attention layer over calibration text."""

from dataclasses import dataclass

from torch import Tensor

from upfit.architecture.layers import Architecture
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import Opaque
from upfit.calibration.statistics import ROWS, add, observe
from upfit.calibration.teacher_student import LayerPair, PairedBatch, pass_by
from upfit.calibration.traits import AttentionTraits


@dataclass(frozen=True)
class LayerSums:
    """One attention layer: its traits and float32 statistics, or why it could not be watched."""

    path: str
    traits: AttentionTraits | str
    sums: dict[str, Tensor]


def gather_layer(model: LayerwiseModel, architecture: Architecture, index: int, batches: list[PairedBatch]) -> LayerSums | None:
    """Run one layer over the teacher's batches, which move on; its statistics, or None for one without key/value heads."""
    block = model.blocks[index]
    model.load(index)
    layer = {layer.path: layer for layer in architecture.layers}.get(block.attention_path) if block.attention else None
    result = None if layer is None else _gather(LayerPair(model, index, layer, architecture.entry, batches, block.module))
    if result is None or isinstance(result.traits, str):
        pass_by(block.module, index, batches, alone=True)
    model.empty(block.module)
    return result


def _gather(pair: LayerPair) -> LayerSums:
    """The statistics of a layer, through which the batches have moved, unless it cannot be watched."""
    try:
        traits, _ = pair.probe()
    except Opaque as reason:
        return LayerSums(pair.layer.path, str(reason), {})
    sums: dict[str, Tensor] = {}
    for batch, watched, rows in pair.watch(rows=ROWS):
        if not batch.held:
            add(sums, observe(watched.seen, traits, rows))
        batch.teacher = watched.output
    return LayerSums(pair.layer.path, traits, {name: tensor.float().cpu().contiguous() for name, tensor in sums.items()})
