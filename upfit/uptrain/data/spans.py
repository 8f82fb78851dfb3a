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
from upfit.text.spans import SENTINEL, Sizes, Vocabulary, corrupt, sentinels, sizes_of
from upfit.uptrain.data.rows import IGNORE, Row, Rows

DEFAULT_LENGTH = 512  # of T5's own pretraining


def find_vocabulary(tokenizer: Any) -> Vocabulary:
    """Raises UpfitError for a tokenizer without sentinels: its model was not trained on spans."""
    ids = sentinels(tokenizer)
    if not ids:
        raise UpfitError(
            f"the tokenizer has no {SENTINEL.format(0)}, and encoder-decoders are trained on spans that sentinels stand "
            "for, as T5 is; a model that was pretrained on something else is not supported"
        )
    return Vocabulary(ids, int(tokenizer.eos_token_id))


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
