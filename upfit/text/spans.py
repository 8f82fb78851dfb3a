"""Span corruption (T5; Raffel et al. 2020, arXiv 1910.10683, section 3.1.4): the mathematics.

About 15 % of a text's tokens are left out, in spans of three on average. The encoder reads the rest, a sentinel in place of
each span; the decoder writes each sentinel and what it stands for:

    text     N tokens
    input    N − noise + spans + 1     what is left, sentinels, end token
    labels   noise + spans + 1         sentinel, span, sentinel, span, ..., end token
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

NOISE, MEAN_SPAN = 0.15, 3.0  # share of the tokens that are left out; tokens of a span on average
SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True)
class Vocabulary:
    """The ids of the sentinels, in the order in which they are used, and of the end token."""

    sentinels: tuple[int, ...]
    end: int


def sentinels(tokenizer: Any) -> tuple[int, ...]:
    """The ids of the tokens that stand for spans, in the order in which they are used; () where there are none."""
    ids: list[int] = []
    known = tokenizer.get_vocab()
    while (name := SENTINEL.format(len(ids))) in known:
        ids.append(known[name])
    return tuple(ids)


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
