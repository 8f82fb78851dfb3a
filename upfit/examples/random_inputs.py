"""Inputs of the right shapes for any class's forward: enough to tell whether two models compute the same.

Shapes come from the config, under the names that families use. Where more than one is possible, the caller takes the first
that the class accepts. Legend: T tokens, F frames, M mel bins, E width of the text's stream.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from upfit.examples.kinds import SOUND

SEED = 0
FEATURES, WAVE = SOUND
SAMPLES = 16_000  # of sound: a second
FRAMES = 512  # where nothing tells how many the model takes
IMAGE_POSITIONS = 16  # of what a layer attends to instead of text
MEL_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_size")
HALVED = 2  # frames that the first convolutions make one of


def possible_inputs(model: Any, ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """Keywords of the model's forward, likely ones first: `ids` [1, T] where it takes text, and random values for all else that
    its class may want. Two models of one shape get the same."""
    generator = torch.Generator().manual_seed(SEED)
    taken = inspect.signature(model.forward).parameters
    base: dict[str, Tensor] = {}
    if model.config.is_encoder_decoder:
        base["decoder_input_ids"] = decoder_ids(model.config, ids, generator)
    if model.main_input_name not in SOUND:
        base["input_ids"] = in_streams(model.config, ids, generator)
    if "cross_attention_states" in taken:  # without them the layers that attend to images are left out
        width = model.config.get_text_config().hidden_size
        base["cross_attention_states"] = random((1, IMAGE_POSITIONS, width), model, generator)
    if model.main_input_name not in SOUND:
        yield base
    if FEATURES in taken:
        bins, frames = mel_bins(model.config), frames_of(model.config, ids.shape[1])
        for shape in ((1, bins, frames), (1, frames, bins)):
            yield base | {FEATURES: random(shape, model, generator)}
    if WAVE in taken:
        yield base | {WAVE: random((1, SAMPLES), model, generator)}


def random(shape: tuple[int, ...], model: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(model.dtype)


def decoder_ids(config: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """[1, T], or [1, T, channels] for a decoder that writes several tokens at once. What is read is written too, if the decoder
    knows the same tokens."""
    decoder = config.get_text_config(decoder=True)
    channels = getattr(decoder, "num_channels", None)
    known = getattr(decoder, "vocab_size", None)
    if isinstance(channels, int) and isinstance(known, int) and getattr(config, "delay_pattern", None):
        return torch.randint(0, known, (*ids.shape, channels), generator=generator)
    return ids if not isinstance(known, int) or int(ids.max()) < known else ids % known


def in_streams(config: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """[1, T], or [1, T, 1 + streams] for a model that reads the tokens of sound beside those of text."""
    streams, known = getattr(config, "num_codebooks", None), getattr(config, "codebook_vocab_size", None)
    if not isinstance(streams, int) or not isinstance(known, int):
        return ids
    return torch.cat([ids[..., None], torch.randint(0, known, (*ids.shape, streams), generator=generator)], -1)


def mel_bins(config: Any) -> int:
    """M, as the config or one inside it tells it."""
    for part in (config, *inner_configs(config)):
        for name in MEL_BINS:
            if isinstance(value := getattr(part, name, None), int):
                return value * getattr(part, "input_channels", 1) if name == MEL_BINS[1] else value
    return 80


def frames_of(config: Any, tokens: int) -> int:
    """F: all that the model hears at once, or what belongs to so many tokens where each hears its own part of the sound."""
    if isinstance(factor := getattr(config, "downsample_factor", None), int):
        return tokens * factor * HALVED
    positions = getattr(config, "max_source_positions", None)
    fixed = isinstance(positions, int) and isinstance(getattr(config, MEL_BINS[0], None), int)
    return positions * HALVED if fixed and isinstance(positions, int) else FRAMES


def inner_configs(config: Any) -> list[Any]:
    """The configs in a config, of encoders first."""
    parts = [(name, value) for name, value in vars(config).items() if hasattr(value, "to_dict")]
    return [
        value for name, value in sorted(parts, key=lambda part: ("encoder" not in part[0] and "audio" not in part[0], part[0]))
    ]
