"""Times prefill and decoding with the cache. Two models take turns in one process.

The loop is transformers' plain eager one. It ranks models against each other on one machine; it is no serving engine.
"""

import platform
import statistics
import time
from typing import Any

import psutil
import torch

from upfit.errors import UpfitError
from upfit.evaluate.cache import NO_CACHE, CachedModel, cache_bytes
from upfit.evaluate.measures import Hardware, Ratio, SpeedRow, Spread, Timing
from upfit.output import Meter

DEFAULT_LENGTHS = (128, 512, 2048)


def settle_lengths(wanted: list[int] | None, steps: int, most: int | None) -> list[int]:
    """The context lengths to time: those wanted, or the default ones, with room for `steps` more within `most` positions.

    Raises UpfitError when a wanted one does not fit.
    """
    if most is not None and most <= steps:
        raise UpfitError(f"--speed-steps {steps} leaves no room in the model's {most} positions; give fewer")
    room = None if most is None else most - steps
    if wanted is None:
        return sorted({min(length, room or length) for length in DEFAULT_LENGTHS})
    if room is not None and max(wanted) > room:
        raise UpfitError(
            f"--speed-lengths {max(wanted)} and {steps} decoded tokens exceed the model's {most} positions; give at most {room}"
        )
    return sorted(set(wanted))


def measure_speed(
    models: dict[str, tuple[Any, torch.Tensor]], lengths: list[int], batch: int, steps: int, repeats: int, meter: Meter
) -> list[SpeedRow]:
    """One row a context length, with each model's tokens per second and cache bytes, keyed as in `models`.

    Each model comes with its text, ids [tokens], repeated as needed. With two models a row also has `ratio`: first over
    second, of the timings taken right after each other. Rates count the tokens of all `batch` sequences.
    Raises UpfitError for a model that returns no cache.
    """
    runs = {key: (CachedModel(model), ids) for key, (model, ids) in models.items()}
    rows = []
    for length in lengths:
        timings: dict[str, list[tuple[float, float, int]]] = {key: [] for key in runs}
        for turn in range(repeats + 1):
            for key, (run, ids) in runs.items():
                text_BT = ids.repeat(-(-length // len(ids)))[:length].repeat(batch, 1).to(run.model.device)
                timing = time_once(run, text_BT, steps)
                if turn:  # the first turn warms up caches, kernels and allocators
                    timings[key].append(timing)
                meter.advance(length + steps, f"{length} tokens")
        rows.append(_row(length, batch, steps, timings))
    return rows


def time_once(run: CachedModel, text_BT: torch.Tensor, steps: int) -> tuple[float, float, int]:
    """Seconds for the prefill of `text_BT`, seconds for `steps` tokens decoded after it, cache bytes in between."""
    start = _now(text_BT.device)
    logits_BV, cache = run(text_BT)
    prefill = _now(text_BT.device) - start
    if cache is None:
        raise UpfitError(f"{NO_CACHE}, so its decoding cannot be timed; leave out --speed")
    held = cache_bytes(cache)
    start = _now(text_BT.device)
    for _ in range(steps):
        logits_BV, cache = run(logits_BV.argmax(-1, keepdim=True), cache)
    return prefill, _now(text_BT.device) - start, held


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _row(length: int, batch: int, steps: int, timings: dict[str, list[tuple[float, float, int]]]) -> SpeedRow:
    rates = {
        key: Timing(
            prefill_tokens_per_s=_spread([batch * length / prefill for prefill, _, _ in taken]),
            decode_tokens_per_s=_spread([batch * steps / decode for _, decode, _ in taken]),
            cache_bytes=taken[-1][2],
        )
        for key, taken in timings.items()
    }
    ratio = None
    if len(timings) == 2:
        first, second = timings.values()
        pairs = list(zip(first, second, strict=True))
        ratio = Ratio(
            prefill=_spread([theirs[0] / ours[0] for ours, theirs in pairs]),
            decode=_spread([theirs[1] / ours[1] for ours, theirs in pairs]),
        )
    return SpeedRow(length, rates["model"], rates.get("against"), ratio)


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def hardware(device: torch.device) -> Hardware:
    """What the numbers were measured on."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Hardware(
        device=str(device),
        machine=platform.machine(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=properties.name if properties else None,
        accelerator_memory_bytes=properties.total_memory if properties else None,
    )
