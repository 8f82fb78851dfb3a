"""The loss of each window, in nats. Shapes: B windows in a batch, T tokens in a window, V vocabulary."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from upfit.errors import UpfitError
from upfit.evaluate.interval import Interval
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.measures import Difference, Loss
from upfit.output import Meter
from upfit.text.windows import Window

ROWS_AT_ONCE = 256  # rows of [V] turned to float32 together: 256 x 128k x 4 bytes = 131 MB
PARTS = 4


@dataclass(frozen=True)
class Losses:
    """Of each window: `nats` and `tokens` [windows, PARTS] in equal parts of the window's scored tokens, `bytes` [windows]."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def per_token(self) -> Interval:
        """Mean loss in nats per scored token."""
        return mean_interval(self.nats.sum(1), self.tokens.sum(1))

    def per_byte(self) -> Interval:
        """Mean loss in bits per byte of the scored text."""
        return mean_interval(self.nats.sum(1) / math.log(2), self.bytes)

    def summary(self) -> Loss:
        loss = self.per_token()
        parts = self.nats.sum(0) / np.maximum(self.tokens.sum(0), 1)
        return Loss(
            nats_per_token=loss,
            perplexity=loss.exp(),
            bits_per_byte=self.per_byte(),
            nats_per_token_by_position=[float(part) for part in parts],
            scored_tokens=int(self.tokens.sum()),
            scored_bytes=int(self.bytes.sum()),
        )


def difference(losses: Losses, other: Losses, same_tokens: bool) -> Difference:
    """`losses` minus `other` on the same texts, paired by window: above 0 means the first is worse.

    In nats per token (with the ratio of perplexities) only where both were given the same tokens; in bits per byte always.
    """
    bits = difference_interval(losses.nats.sum(1) / math.log(2), losses.bytes, other.nats.sum(1) / math.log(2), other.bytes)
    if not same_tokens:
        return Difference("bits per byte", bits)
    nats = difference_interval(losses.nats.sum(1), losses.tokens.sum(1), other.nats.sum(1), other.tokens.sum(1))
    return Difference("nats per token", bits, nats, nats.exp())


def window_losses(model: Any, windows: list[Window], batch: int, name: str, meter: Meter) -> Losses:
    """Run `model` (in eval mode) over the windows, `batch` of equal length at a time, without a cache.

    Raises UpfitError when a loss is not finite or the memory does not suffice.
    """
    nats, tokens = np.zeros((len(windows), PARTS)), np.zeros((len(windows), PARTS), dtype=np.int64)
    alike = defaultdict(list)
    for index, window in enumerate(windows):
        alike[len(window.ids)].append(index)
    for indices in alike.values():
        for at in range(0, len(indices), batch):
            chosen = indices[at : at + batch]
            ids_BT = torch.from_numpy(np.stack([windows[i].ids for i in chosen])).to(model.device)
            try:
                losses_BT = token_losses(model, ids_BT)
            except torch.OutOfMemoryError as error:
                raise UpfitError(f"{name} does not fit in memory with --batch {batch}; give a smaller one") from error
            nats[chosen], tokens[chosen] = by_position(losses_BT)
            meter.advance(len(chosen))
    bad = int((~np.isfinite(nats.sum(1))).sum())
    if bad:
        raise UpfitError(f"{name} gives a loss that is not finite in {bad} of {len(windows)} windows; try --dtype float32")
    return Losses(nats, tokens, np.array([window.scored_bytes for window in windows]))


@torch.inference_mode()
def token_losses(model: Any, ids_BT: torch.Tensor) -> np.ndarray:
    """`-log p(token | the tokens before it)` of all tokens but the first: [B, T - 1], computed in float32, as float64.

    Only ROWS_AT_ONCE rows of logits are ever held in float32; the model's own logits are as large as it makes them.
    """
    logits_BTV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
    rows = logits_BTV[:, :-1].flatten(0, 1)
    targets = ids_BT[:, 1:].flatten()
    parts = [
        torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        for part, wanted in zip(rows.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).cpu().double().numpy().reshape(ids_BT.shape[0], -1)


def by_position(losses_BT: np.ndarray, parts: int = PARTS) -> tuple[np.ndarray, np.ndarray]:
    """Sums [B, parts] and counts [parts] of the losses in equal parts of the window, first to last."""
    length = losses_BT.shape[1]
    part = np.arange(length) * parts // length
    sums = np.stack([losses_BT[:, part == p].sum(1) for p in range(parts)], axis=1)
    return sums, np.bincount(part, minlength=parts)
