"""Span corruption for encoder-decoders (T5; Raffel et al. 2020, arXiv 1910.10683, section 3.1.4).

About 15 % of a row's tokens are left out, in spans of three on average. The encoder reads the rest, a sentinel in place of
each span; the decoder writes each sentinel and what it stands for. All rows of a run have the same two lengths, so nothing is
padded:

    text     N tokens
    input    N − noise + spans + 1     what is left, sentinels, end token
    labels   noise + spans + 1         sentinel, span, sentinel, span, ..., end token

Which tokens are left out follows from the row's number and the run's seed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from upfit.errors import UpfitError
from upfit.uptrain.data.rows import IGNORE, Row, Rows

NOISE, MEAN_SPAN = 0.15, 3.0  # share of the tokens that are left out; tokens of a span on average
SENTINEL = "<extra_id_{}>"
DEFAULT_LENGTH = 512  # of T5's own pretraining


@dataclass(frozen=True)
class Vocabulary:
    """The ids of the sentinels, in the order in which they are used, and of the end token."""

    sentinels: tuple[int, ...]
    end: int


def find_vocabulary(tokenizer: Any) -> Vocabulary:
    """Raises UpfitError for a tokenizer without sentinels: its model was not trained on spans."""
    sentinels: list[int] = []
    known = tokenizer.get_vocab()
    while (name := SENTINEL.format(len(sentinels))) in known:
        sentinels.append(known[name])
    if not sentinels:
        raise UpfitError(
            f"the tokenizer has no {SENTINEL.format(0)}, and encoder-decoders are trained on spans that sentinels stand "
            "for, as T5 is; a model that was pretrained on something else is not supported"
        )
    return Vocabulary(tuple(sentinels), int(tokenizer.eos_token_id))


@dataclass(frozen=True)
class Sizes:
    """Of every row: `text` tokens, of which `noise` are left out in `spans` spans."""

    text: int
    noise: int
    spans: int

    @property
    def input(self) -> int:
        return self.text - self.noise + self.spans + 1

    @property
    def labels(self) -> int:
        return self.noise + self.spans + 1


def sizes_of(text: int) -> Sizes:
    noise = min(max(round(text * NOISE), 1), text - 1)
    return Sizes(text, noise, min(max(round(noise / MEAN_SPAN), 1), text - noise))


def fitting(length: int) -> Sizes:
    """The longest text whose input has at most `length` tokens. Raises UpfitError when there is none."""
    text = length
    while text >= 2 and sizes_of(text + 1).input <= length:
        text += 1
    while text >= 2 and sizes_of(text).input > length:
        text -= 1
    if text < 2:
        raise UpfitError(f"--length {length} is too short for span corruption; give 3 or more")
    return sizes_of(text)


def cut(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """`total` things as `parts` runs of at least one, every way as likely as any other; int64 [parts]."""
    borders = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], borders, [total]]))


def corrupt(
    text: np.ndarray, sizes: Sizes, vocabulary: Vocabulary, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Input and labels, int64, of the tokens `text`. What is kept comes first and what is left out last, as in T5."""
    text_lengths = cut(sizes.text - sizes.noise, sizes.spans, random)
    lost = cut(sizes.noise, sizes.spans, random)
    inputs: list[Any] = []
    labels: list[Any] = []
    at = 0
    for sentinel, before, gone in zip(vocabulary.sentinels, text_lengths, lost, strict=False):
        inputs += [text[at : at + before], [sentinel]]
        labels += [[sentinel], text[at + before : at + before + gone]]
        at += before + gone
    end = [[vocabulary.end]]
    return np.concatenate(inputs + end).astype(np.int64), np.concatenate(labels + end).astype(np.int64)


@dataclass(frozen=True)
class SpanRow(Row):
    """`input_ids` are the encoder's and `labels` the decoder's, of another length."""

    read: int = 0

    @property
    def tokens(self) -> int:
        return self.read if self.supervised else 0


class SpanRows(Rows):
    """The rows of `text`, which have `sizes.text` tokens each, with spans left out."""

    def __init__(self, text: Rows, sizes: Sizes, vocabulary: Vocabulary, seed: int) -> None:
        self.text, self.sizes, self.vocabulary, self.seed = text, sizes, vocabulary, seed
        self.total, self.holdout = text.total, text.holdout
        if sizes.spans > len(vocabulary.sentinels):
            raise UpfitError(
                f"a row of {sizes.input} tokens has {sizes.spans} spans left out, "
                f"the tokenizer {len(vocabulary.sentinels)} sentinels for them; lower --length"
            )

    def at(self, row: int) -> Row:
        inputs, labels = corrupt(
            self.text.at(row).input_ids, self.sizes, self.vocabulary, np.random.default_rng([self.seed, row])
        )
        return SpanRow(inputs, self._no_positions, labels, self.sizes.text)

    def empty(self) -> Row:
        ids = np.zeros(self.sizes.input, dtype=np.int64)
        return SpanRow(ids, self._no_positions, np.full(self.sizes.labels, IGNORE), self.sizes.text)

    def sample(self, index: int) -> int:
        return self.text.sample(index)

    def passes(self, samples: int) -> dict[str, float]:
        return self.text.passes(samples)

    def held_out(self) -> dict[str, list[int]]:
        return self.text.held_out()

    @cached_property
    def _no_positions(self) -> np.ndarray:
        """The model counts positions itself."""
        return np.zeros(self.sizes.labels, dtype=np.int64)
