"""`--probe position`: the loss of running text by position in a long window, in finer parts than the quarters of the main loss.

Every window is full, so that each part of the curve is of the same texts. A model that uses distant text gets better along it.
Legend: W windows of one length, T tokens of a window, P parts of it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from upfit.errors import UpfitError
from upfit.evaluate.cache import CachedModel
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.loss import by_position
from upfit.evaluate.probes.reader import CHUNK, check_goes_on
from upfit.evaluate.probes.summaries import Position, PositionRow
from upfit.output import Meter
from upfit.text import Document
from upfit.text.windows import SEED, digest, make_windows, retokenised, same_tokens, spread

PARTS = 16


@dataclass(frozen=True)
class Sample:
    """A window of `length` tokens of the first tokenizer; `digest` is that of all of this length, in a model's own tokens."""

    length: int
    ids: np.ndarray
    digest: str


def make_samples(tokenizers: list[Any], documents: list[Document], count: int, lengths: list[int]) -> list[list[Sample]]:
    """For each tokenizer the same texts, at most `count` of each length. Raises UpfitError when no document is long enough."""
    samples: list[list[Sample]] = [[] for _ in tokenizers]
    for length in lengths:
        windows = [w for w in make_windows(documents, tokenizers[0], length, 10**9) if len(w.ids) == length]
        if not windows:
            raise UpfitError(f"--probe position: no text is {length} tokens long; give longer ones with --data")
        chosen = [windows[index] for index in spread(len(windows), count, SEED)]
        for own, tokenizer in zip(samples, tokenizers, strict=True):
            laid = chosen if same_tokens(chosen, tokenizers[0], tokenizer) else retokenised(chosen, tokenizer)
            own += [Sample(length, window.ids, digest(laid)) for window in laid]
    return samples


@dataclass(frozen=True)
class Read:
    """Nats and numbers of the scored tokens of one window in equal parts of it [P]."""

    length: int
    digest: str
    nats: np.ndarray
    tokens: np.ndarray


@torch.inference_mode()
def probe(model: Any, samples: list[Sample], meter: Meter) -> list[Read]:
    """The loss of every token, in chunks of a window, so that only a chunk's logits are held.

    Raises UpfitError when the model does not go on from its cache as if it had read everything at once.
    """
    run, reads = CachedModel(model), []
    check_goes_on(run, torch.from_numpy(samples[0].ids)[None].to(model.device))
    for sample in samples:
        ids = torch.from_numpy(sample.ids).to(model.device)
        losses, cache = [], None
        for start in range(0, len(ids) - 1, CHUNK):
            fed = ids[start : min(start + CHUNK, len(ids) - 1)]
            logits, cache = run.logits(fed[None], cache, len(fed))
            wanted = ids[start + 1 : start + 1 + len(fed)]
            losses.append(torch.nn.functional.cross_entropy(logits[0].float(), wanted, reduction="none"))
        nats, tokens = by_position(torch.cat(losses).double().cpu().numpy()[None], PARTS)
        reads.append(Read(sample.length, sample.digest, nats[0], tokens))
        meter.advance(1)
    return reads


def summary(reads: list[Read], samples: list[Sample]) -> Position:
    """For each length the curve: the middle of each part as a share of the window, and its nats a token with intervals."""
    return Position({str(length): _curve(reads, length) for length in dict.fromkeys(read.length for read in reads)})


def _curve(reads: list[Read], length: int) -> PositionRow:
    nats, tokens = _columns(reads, length)
    parts = [mean_interval(nats[:, part], tokens[:, part]) for part in range(PARTS)]
    return PositionRow(
        windows=len(nats),
        nats_per_token=mean_interval(nats.sum(1), tokens.sum(1)),
        depths=[(part + 0.5) / PARTS for part in range(PARTS)],
        nats=[part.mean for part in parts],
        intervals=parts,
        perplexities=[part.exp().mean for part in parts],
    )


def compared(first: list[Read], second: list[Read]) -> dict[str, Any]:
    """First minus second by position, paired by window; None at a length where the tokens are not the same."""
    differences: dict[str, Any] = {}
    for length in dict.fromkeys(read.length for read in first):
        digests = [{read.digest for read in side if read.length == length} for side in (first, second)]
        (own, weights), (other, others) = (_columns(side, length) for side in (first, second))
        differences[str(length)] = (
            {
                "nats_per_token": difference_interval(own.sum(1), weights.sum(1), other.sum(1), others.sum(1)).record(),
                "intervals": [
                    difference_interval(own[:, part], weights[:, part], other[:, part], others[:, part]).record()
                    for part in range(PARTS)
                ],
            }
            if digests[0] == digests[1]
            else None
        )
    return {"lengths": differences}


def _columns(reads: list[Read], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of the windows of a length [W, P]."""
    of_length = [read for read in reads if read.length == length]
    return np.array([read.nats for read in of_length]), np.array([read.tokens for read in of_length])
