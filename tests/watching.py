"""Watches what every attention of a tiny model does, on what the model takes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_inputs, tiny_model
from upfit.architecture.layers import open_model
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import Opaque
from upfit.calibration.rotation import Turns
from upfit.calibration.teacher_student import LayerPair, PairedBatch, pass_by
from upfit.calibration.traits import AttentionTraits, bands
from upfit.checkpoint.reader import open_checkpoint
from upfit.errors import UpfitError
from upfit.examples.model_inputs import ModelInputs


def watch_type(
    model_type: str, own: bool = False, **changes: Any
) -> Iterator[tuple[LayerPair, AttentionTraits | None, Turns | None]]:
    """Each attention with key/value heads, its traits and rotation; None where it cannot be watched. Raises Opaque where the
    model cannot be run layer by layer, UpfitError where it is refused."""
    model = tiny_model(model_type, **changes)
    inputs = tiny_inputs(model)
    if not model.config.is_encoder_decoder:
        inputs = {"input_ids": torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield from watch_folder(Path(folder), one_batch(inputs), own)


def one_batch(inputs: dict[str, Tensor]) -> ModelInputs:
    """All of `inputs`, those of fewer rows repeated."""
    rows = max(map(len, inputs.values()))
    return ModelInputs({name: tensor.expand(rows, *tensor.shape[1:]).contiguous() for name, tensor in inputs.items()})


def watch_folder(
    folder: Path, inputs: ModelInputs, own: bool = False
) -> Iterator[tuple[LayerPair, AttentionTraits | None, Turns | None]]:
    """`watch_type`, of a model in a folder."""
    with open_checkpoint(folder) as stored:
        checkpoint, architecture = open_model(stored, own)
        stream = LayerwiseModel(checkpoint, architecture, [inputs])
        (batch,) = stream.batches
        assert batch.hidden is not None
        pair = PairedBatch(False, batch.calls, batch.calls, batch.hidden, batch.hidden, batch.hidden.shape[1])
        for index, block in enumerate(stream.blocks):
            stream.load(index)
            for layer in architecture.layers:
                if layer.path.startswith(f"{block.path}."):
                    attention = LayerPair(stream, index, layer, architecture.entry, [pair], block.module)
                    try:
                        yield attention, *attention.probe()
                    except Opaque:
                        yield attention, None, None
            pass_by(block.module, index, [pair], alone=True)


def bands_of(model_type: str) -> list[str]:
    """Every band that a merge of this type uses, sorted; none where its heads are averaged."""
    try:
        return sorted({band for _, traits, _ in watch_type(model_type) if traits for band in bands(traits)})
    except (Opaque, UpfitError):
        return []
