"""How many bytes an encoder-decoder keeps: for each token that is written, and for each position that the encoder gives; or a
model that is shown images: for each token."""

from typing import Any

import torch
from transformers import EncoderDecoderCache

from upfit.architecture.forwards import cache_of
from upfit.evaluate.cache import cache_bytes, cache_tensors
from upfit.evaluate.encoder_decoder.losses import on_device
from upfit.evaluate.measures import CacheGrowth, CrossCache
from upfit.examples.model_inputs import IGNORE, Example, ModelInputs, alone, together
from upfit.examples.targets import most_written

OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
LONG = 24  # tokens of the longer of the two runs that give the slope


def measure_caches(model: Any, example: Example, pad: int) -> tuple[CacheGrowth | None, CrossCache | None]:
    """Fill the model's own caches with the example to two lengths; None for what it does not return."""
    if model.config.is_encoder_decoder:
        inputs = together([example], pad)
        long = max(2, min(LONG, most_written(model.config)))
        short = max(1, long // 3)
        caches = [filled(model, inputs, length) for length in (short, long)]
    else:
        inputs, long = alone(example), len(example.decoder_ids)
        short = long - max(1, int((example.labels != IGNORE).sum()) // 2)
        caches = [filled_behind_image(model, inputs, length) for length in (short, long)]
    if caches[1] is None:
        return None, None
    split = all(isinstance(cache, EncoderDecoderCache) for cache in caches)
    own = [cache.self_attention_cache if split else cache for cache in caches]
    before, after = map(cache_bytes, own)
    slope = (after - before) / (long - short)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in cache_tensors(caches[1])})
    growth = CacheGrowth(slope, after - slope * long, None, None, dtypes)
    return growth, cross_cache(caches[1].cross_attention_cache) if split else None


@torch.inference_mode()
def filled(model: Any, inputs: ModelInputs, length: int) -> Any:
    """The cache after `length` tokens of the decoder, which are repeated as needed."""
    keywords = on_device(model, inputs)
    ids = keywords["decoder_input_ids"]
    keywords["decoder_input_ids"] = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
    return cache_of(model(**keywords, use_cache=True))


@torch.inference_mode()
def filled_behind_image(model: Any, inputs: ModelInputs, length: int) -> Any:
    """The cache after the first `length` tokens, the image among them."""
    keywords = on_device(model, inputs)
    of_tokens = {name: value[:, :length] for name, value in keywords.items() if name in OF_TOKENS}
    return cache_of(model(**keywords | of_tokens, use_cache=True))


def cross_cache(cache: Any) -> CrossCache | None:
    tensors = cache_tensors(cache)
    if not tensors:
        return None
    positions, size = max(tensor.shape[-2] for tensor in tensors), cache_bytes(cache)
    return CrossCache(size / positions, positions, size)
