"""What single heads look at: their shares on a place in a text, and the whole maps of a few.

Weights are taken as they reach the values: a differential layer's maps are differences, and a share is of the sum of absolute
weights. Layers are counted as the model calls its attention, from 0; heads are those of the output, from 0, by the numbers that
they had in the model that was converted: a conversion may sort heads, and then says so in recipe.json.

Legend: H heads, R query positions, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upfit import provenance
from upfit.calibration.observe import NAME, Listener, Seen, listening, register

MAP_TOKENS = 96  # of the text whose maps are kept whole: a map is one number for each two tokens
DIGITS = 4  # behind the point, of what is kept


@contextmanager
def watching(model: Any, listener: Listener) -> Iterator[None]:
    """Inside the block, `listener` is called for every attention of `model`, on any attention implementation."""
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with listening(listener):
            yield
    finally:
        model.set_attn_implementation(before)


def head_maps(seen: Seen, row: int | None = None) -> Tensor:
    """[H, R, T] of the first text: all its query positions, or with `row` that one alone (R = 1)."""
    rows = torch.arange(seen.q.shape[2]) if row is None else torch.tensor([row])
    _, weights = seen.scores(rows.to(seen.q.device), seen.k.shape[2])
    combine = getattr(seen.module, "combine_maps", None)
    return (weights if combine is None else combine(weights, row))[0].float()


def shares(seen: Seen, row: int) -> Tensor:
    """[H, T]: the part of each head's attention that the query position `row` gives to each token; sums to 1."""
    maps = head_maps(seen, row)[:, 0].abs()
    return maps / maps.sum(-1, keepdim=True).clamp_min(1e-12)


@torch.inference_mode()
def all_maps(model: Any, ids: np.ndarray) -> list[Tensor]:
    """[H, T, T] of every layer on the text `ids` [T], on the CPU; empty for a model whose attention cannot be watched."""
    maps: list[Tensor] = []
    with watching(model, lambda seen: maps.append(head_maps(seen).cpu())):
        model(input_ids=torch.from_numpy(ids)[None].to(model.device), use_cache=False)
    return maps


def choose(by_head: list[list[float]], count: int) -> list[tuple[int, int]]:
    """(layer, head) of the `count` largest numbers in `by_head` [layer][head], the largest first."""
    ranked = sorted((-share, layer, head) for layer, heads in enumerate(by_head) for head, share in enumerate(heads))
    return [(layer, head) for _, layer, head in ranked[:count]]


def places(steps: list[dict[str, Any]], by_head: list[list[float]]) -> list[list[int]]:
    """Where in each layer [layer][source's head] a head of the source is now, by the orders that the conversions in a model's
    history noted; `by_head` [layer][head] says how many there are."""
    counts = [len(heads) for heads in by_head]
    was = [list(range(count)) for count in counts]
    for step in steps:
        orders = provenance.head_order(step, counts)
        was = [[heads[number] for number in order] for heads, order in zip(was, orders, strict=True)]
    return [[heads.index(head) for head in range(len(heads))] for heads in was]


def record_maps(maps: list[Tensor], heads: list[tuple[int, int]], now: list[list[int]]) -> list[dict[str, Any]]:
    """As JSON can hold it, of those of `heads` that there are (`now`: see `places`); row i has the i + 1 tokens it may see."""
    return [
        {"layer": layer, "head": head, "own_head": now[layer][head], "weights": _rows(maps[layer][now[layer][head]])}
        for layer, head in heads
        if layer < len(maps) and head < len(now[layer])
    ]


def _rows(weights: Tensor) -> list[list[float]]:
    return [_rounded(row[: index + 1]) for index, row in enumerate(weights.tolist())]


def record_by_head(samples: list[list[list[float]]]) -> list[list[float]]:
    """Means over samples of numbers [sample][layer][head]; layers may differ in their heads."""
    return [_rounded(np.mean(layer, 0).tolist()) for layer in zip(*samples, strict=True)]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, DIGITS) + 0.0 for value in values]  # + 0.0: no -0.0
