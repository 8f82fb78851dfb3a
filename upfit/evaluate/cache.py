"""How many bytes a model keeps for each token of context, measured on the cache that it fills."""

import functools
import sys
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from upfit.architecture.forwards import ADVICE, LOGITS_TO_KEEP, cache_name, cache_of, takes
from upfit.errors import UpfitError
from upfit.evaluate.measures import CacheGrowth

NO_CACHE = "the model returns no cache"
LONG = 48  # tokens of the longer of the two runs that give the slope
LONGEST_WINDOW = 16384  # a sliding window above this is not filled: the run would take too long


class CachedModel:
    """Calls a causal language model with its cache, whatever the argument is called, and asks only for the logits that are
    wanted.

    Raises UpfitError where the model does not use the cache that it is given: its logits would be those of another text.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keeps = takes(model.forward, LOGITS_TO_KEEP)

    @functools.cached_property
    def cache_name(self) -> str:
        return cache_name(self.model.forward)

    @torch.inference_mode()
    def __call__(self, ids_BT: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Feed `ids_BT` after what `cache` holds. Returns the last logits [B, V] and the cache (None: the model has none)."""
        logits_BTV, cache = self.logits(ids_BT, cache, 1)
        return logits_BTV[:, -1], cache

    @torch.inference_mode()
    def logits(self, ids_BT: torch.Tensor, cache: Any, last: int) -> tuple[torch.Tensor, Any]:
        """The same with the logits of the `last` tokens [B, last, V]. A cache that is given is changed."""
        before = tokens_held(cache)
        extra: dict[str, Any] = {} if cache is None else {self.cache_name: cache}
        if self.keeps:
            extra[LOGITS_TO_KEEP] = last
        result = self.model(input_ids=ids_BT, use_cache=True, **extra)
        after = cache_of(result)
        if cache is not None:
            self._check_used(cache, before, after, ids_BT.shape[1])
        return result.logits[:, -last:], after

    def _check_used(self, cache: Any, before: int | None, after: Any, tokens: int) -> None:
        """What comes back must be the cache that was given and, where it counts tokens, with as many more as were fed."""
        held = tokens_held(after)
        grown = after is cache if before is None else held == before + tokens
        if not grown:
            counted = "" if before is None else f": it held {before} tokens, {tokens} were fed, and now it holds {held or 0}"
            kind = type(self.model).__name__
            raise UpfitError(f"{kind} did not go on from the cache that it was given{counted}; {ADVICE}")


def tokens_held(cache: Any) -> int | None:
    """How many tokens a cache says that it holds; None where it does not count them (states of recurrences)."""
    try:
        return int(cache.get_seq_length()) if isinstance(cache, Cache) else None
    except ValueError:  # no layer of it is of attention
        return None


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Every tensor that a cache of any class holds, counters left out."""
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in seen or isinstance(value, str | torch.nn.Module | PreTrainedConfig | type):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.dim() > 0:
                tensors.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif hasattr(value, "__dict__"):
            walk(vars(value))

    walk(cache)
    return tensors


def cache_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for tensor in cache_tensors(cache))


def sliding_windows(cache: Any) -> set[int]:
    """The windows, in tokens, of the layers that keep only their newest keys and values."""
    layers = cache.layers if isinstance(cache, Cache) else []
    return {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}


def measure_cache(model: Any, ids: torch.Tensor, most: int | None) -> CacheGrowth | None:
    """Grow the model's own cache and take the slope between two lengths; None for a model that returns no cache.

    `ids` [tokens] are repeated as needed; `most` is how many positions the model takes (None: no limit).
    """
    run, limit = CachedModel(model), most or sys.maxsize
    cache = run(ids[None, :2])[1]
    if cache is None:
        return None
    windows = {window for window in sliding_windows(cache) if window < limit}

    def grown(length: int) -> int:
        return cache_bytes(run(ids.repeat(-(-length // len(ids)))[None, :length])[1])

    # a full sliding layer keeps one token less than its window
    long = max(2, min([LONG, limit, *(window - 1 for window in windows)]))
    short = max(1, long // 3)
    at_long = grown(long)
    slope = (at_long - grown(short)) / (long - short)
    beyond, largest = None, max(windows, default=None)
    if largest is not None and largest + 2 <= min(limit, LONGEST_WINDOW):
        end = min(largest + LONG, limit, LONGEST_WINDOW)
        beyond = (grown(end) - grown(largest)) / (end - largest)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in cache_tensors(cache)})
    return CacheGrowth(slope, at_long - slope * long, largest, beyond, dtypes)
