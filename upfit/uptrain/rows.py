"""The rows that a step takes: they follow from the step's number alone, so a resumed run reads on exactly where it stopped."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from upfit.errors import UpfitError
from upfit.uptrain.shards import Shards

IGNORE = -100  # a label that counts nothing, as in torch


@dataclass(frozen=True)
class Row:
    """One row of training data; the three arrays are int64 [length]."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray

    @property
    def supervised(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """Tokens read; a row that only fills up a process has none."""
        return len(self.labels) if self.supervised else 0


class Rows(ABC):
    """Numbered rows: `holdout`, spread evenly over the data, to measure on, and those for `training`, shuffled by `seed`."""

    def __init__(self, total: int, holdout: int, seed: int) -> None:
        held = min(holdout, total // 10)
        self.seed = seed
        self.holdout = [(2 * index + 1) * total // (2 * held) for index in range(held)]
        self.training = np.delete(np.arange(total, dtype=np.uint32 if total < 2**32 else np.int64), self.holdout)

    @abstractmethod
    def at(self, row: int) -> Row:
        """Row number `row`."""

    @abstractmethod
    def empty(self) -> Row:
        """A row without labels: fills up a process that has fewer rows than others."""

    def arranged(self, rows: list[int]) -> list[int]:
        """The rows of one step in the order in which they are worked on."""
        return rows

    def sample(self, index: int) -> int:
        """The row that is the `index`-th of training, counted over epochs; each epoch is its own permutation."""
        epoch, place = divmod(index, len(self.training))
        return int(_permuted(self, epoch)[place])

    def of_step(self, step: int, rows: int, rank: int, world: int) -> list[Row]:
        """Process `rank`'s share of the `rows` rows of step `step`.

        Which rows a step takes does not depend on `world`. Every process gets the same number; some may be empty.
        """
        return self.share([self.sample(step * rows + place) for place in range(rows)], rank, world)

    def share(self, rows: list[int], rank: int, world: int) -> list[Row]:
        mine = [self.at(row) for row in self.arranged(rows)[rank::world]]
        return mine + [self.empty()] * (-(-len(rows) // world) - len(mine))


@lru_cache(maxsize=4)
def _permuted(rows: Rows, epoch: int) -> np.ndarray:
    return np.random.default_rng([rows.seed, epoch]).permutation(rows.training)


class TextRows(Rows):
    """The tokens of `shards` side by side: row k is k·length … (k+1)·length, so every row has the same length."""

    def __init__(self, shards: Shards, length: int, holdout: int, seed: int, document_mask: bool = True) -> None:
        self.shards, self.length, self.document_mask = shards, length, document_mask
        super().__init__((shards.tokens - 1) // length, holdout, seed)
        if len(self.training) == 0:
            raise UpfitError(f"{shards.folder} holds {shards.tokens} tokens, less than a row of {length}; add text")

    def at(self, row: int) -> Row:
        """Row `row` of the data: labels are the next tokens; the first token of a document is nobody's label."""
        start = row * self.length
        tokens = self.shards.read(start, start + self.length + 1)
        begins = self.shards.document_starts(start, start + self.length + 1)
        labels = tokens[1:].copy()
        labels[begins[begins > 0] - 1] = IGNORE
        positions = np.arange(self.length)
        if self.document_mask:
            first = np.zeros(self.length, dtype=np.int64)
            inside = begins[begins < self.length]
            first[inside] = inside
            positions = positions - np.maximum.accumulate(first)
        return Row(tokens[:-1], positions, labels)

    def empty(self) -> Row:
        ids = np.zeros(self.length, dtype=np.int64)
        return Row(ids, np.arange(self.length), np.full(self.length, IGNORE))
