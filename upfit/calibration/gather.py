"""Sums up the statistics of one attention layer over calibration text."""

from dataclasses import dataclass

from torch import Tensor

from upfit.architecture.layers import Architecture
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import Opaque, run_block
from upfit.calibration.statistics import ROWS, add, observe, sample_rows
from upfit.calibration.traits import AttentionTraits, probe_attention, watch


@dataclass(frozen=True)
class LayerSums:
    """One attention layer: its traits and float32 statistics, or why it could not be watched."""

    path: str
    traits: AttentionTraits | str
    sums: dict[str, Tensor]


def gather_layer(model: LayerwiseModel, architecture: Architecture, index: int, held: list[bool]) -> LayerSums | None:
    """Run one layer over every batch of the stream, which moves on; its statistics, or None for one without key/value heads."""
    block = model.blocks[index]
    model.load(index)
    layer = {layer.path: layer for layer in architecture.layers}.get(block.attention_path) if block.attention else None
    traits: AttentionTraits | str = "no attention"
    sums: dict[str, Tensor] = {}
    if layer is not None:
        longest = max(model.batches, key=lambda batch: batch.ids.shape[1])
        assert longest.hidden is not None
        try:
            traits, _ = probe_attention(block, architecture.entry, layer.geometry, longest.hidden, longest.calls[index])
        except Opaque as reason:
            traits = str(reason)
    for number, (batch, back) in enumerate(zip(model.batches, held, strict=True)):
        assert batch.hidden is not None
        if isinstance(traits, str) or back:
            batch.hidden = run_block(block.module, batch.hidden, batch.calls[index])
            continue
        watched = watch(block, batch.hidden, batch.calls[index], ())
        rows = sample_rows(batch.ids.shape[1], ROWS, index, number, batch.hidden.device)
        add(sums, observe(watched.seen, traits, rows))
        batch.hidden = watched.output
    model.empty(block.module)
    if layer is None:
        return None
    return LayerSums(layer.path, traits, {name: tensor.float().cpu().contiguous() for name, tensor in sums.items()})
