"""Examples of what a model reads and writes, and how they are put together as inputs of its forward.

Legend: B examples of a batch, S positions that the encoder reads, T positions of the decoder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.meta_model import read_as_class
from upfit.examples.kinds import of_family

IGNORE = -100
SAMPLES_A_POSITION = 320  # of sound at 16 kHz: what most encoders that take samples make one position of
FRAMES_A_POSITION = 2  # of features, as Whisper halves them


@dataclass(frozen=True)
class ModelInputs:
    """What a model's forward is given for one batch.

    keywords: by their names there: input_ids, attention_mask, decoder_input_ids, input_features ...
    counted: [B, T] bool, the positions of the (decoder's) stream that are no padding; None for all of them
    labels: [B, T], the token that each position should give next, IGNORE where it does not count
    own_positions: an image in it, not a token's place alone, tells by how much queries and keys are turned
    """

    keywords: dict[str, Tensor]
    counted: Tensor | None = None
    labels: Tensor | None = None
    own_positions: bool = False


@dataclass(frozen=True)
class Example:
    """One thing to read and what is to be written for it, without a batch dimension.

    keywords: the encoder's: input_ids [S], or input_features [mels, frames]; of a decoder that sees all but the ids, as its
        processor gives them for a batch of one (pixel_values, image_grid_thw ...)
    decoder_ids: [T], begins with the decoder's start, or with what a decoder that sees reads first
    labels: [T]
    text: what is to be written, as text
    document: what it belongs to, for splits and intervals
    """

    keywords: dict[str, Tensor]
    decoder_ids: Tensor
    labels: Tensor
    text: str
    document: str


@dataclass(frozen=True)
class Examples:
    """kind: "text pairs", "spans", "sound" or "images"; record: what they are, for recipe.json."""

    kind: str
    examples: list[Example]
    record: dict[str, Any]


def padding_of(config: dict[str, Any]) -> int:
    """The id that fills up a batch of an encoder-decoder. Nothing depends on it: its positions are masked, or come after all
    that counts."""
    parsed = read_as_class(of_family(config))
    pad = getattr(parsed, "pad_token_id", None) if parsed.is_encoder_decoder else None
    return pad if isinstance(pad, int) and pad >= 0 else 0


def batches(examples: Sequence[Example], config: dict[str, Any], tokens: int) -> list[ModelInputs]:
    """The examples, those of similar lengths together, in batches of at most `tokens` positions of encoder and decoder, or of
    one example; padded on the right. Those of a decoder, with images, each by itself: how images of several examples are put
    together is each family's own. The same examples give the same batches."""
    if not read_as_class(of_family(config)).is_encoder_decoder:
        return [alone(example) for example in sorted(examples, key=lambda example: len(example.decoder_ids))]
    pad = padding_of(config)
    return [together([examples[index] for index in indices], pad) for indices in grouped(examples, tokens)]


def alone(example: Example) -> ModelInputs:
    """The batch of an example with images."""
    keywords = {**example.keywords, "input_ids": example.decoder_ids[None]}
    return ModelInputs(keywords, labels=example.labels[None], own_positions=True)


def grouped(examples: Sequence[Example], tokens: int) -> Iterator[list[int]]:
    """The numbers of the examples that make a batch, batch by batch, from the shortest to the longest."""
    sizes = [(encoder_length(example), len(example.decoder_ids)) for example in examples]
    indices: list[int] = []
    read = written = 0
    for index in sorted(range(len(examples)), key=lambda index: (*sizes[index], index)):
        read, written = max(read, sizes[index][0]), max(written, sizes[index][1])
        if indices and (len(indices) + 1) * (read + written) > tokens:
            yield indices
            indices, (read, written) = [], sizes[index]
        indices.append(index)
    if indices:
        yield indices


def encoder_length(example: Example) -> int:
    """About how many positions the encoder makes of the example."""
    if "input_ids" in example.keywords:
        return len(example.keywords["input_ids"])
    sound = next(value for name, value in example.keywords.items() if name != "attention_mask")
    frames = max(sound.shape)
    return max(1, frames // (SAMPLES_A_POSITION if sound.ndim == 1 else FRAMES_A_POSITION))


def together(examples: Sequence[Example], pad: int) -> ModelInputs:
    """One batch of the examples. Ids are filled up with `pad`, labels with IGNORE, sound and masks with zeros."""
    keywords = {
        name: padded([example.keywords[name] for example in examples], pad if name == "input_ids" else 0)
        for name in examples[0].keywords
    }
    if "input_ids" in keywords:
        read = [torch.ones_like(example.keywords["input_ids"]) for example in examples]
        keywords["attention_mask"] = padded(read, 0)
    ids = [example.decoder_ids for example in examples]
    return ModelInputs(
        keywords={**keywords, "decoder_input_ids": padded(ids, pad)},
        counted=padded([torch.ones(len(row), dtype=torch.bool) for row in ids], 0),
        labels=padded([example.labels for example in examples], IGNORE),
    )


def padded(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """[B, ...]: the tensors, which have as many dimensions, each filled up at its ends to the longest."""
    shape = torch.tensor([tensor.shape for tensor in tensors]).amax(0).tolist()
    result = tensors[0].new_full((len(tensors), *shape), fill)
    for row, tensor in zip(result, tensors, strict=True):
        row[tuple(map(slice, tensor.shape))] = tensor
    return result
