"""The rows of each step. They follow from the step's number alone, so a resumed run continues exactly where it stopped."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from upfit.errors import UpfitError
from upfit.uptrain.data.shards import Shards

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
    """`total` numbered rows: those in `holdout` to measure on, the others to train on in an order that never ends."""

    total: int
    holdout: list[int]

    @abstractmethod
    def at(self, row: int) -> Row:
        """Row number `row`."""

    @abstractmethod
    def empty(self) -> Row:
        """A row without labels: fills up a process that has fewer rows than others."""

    @abstractmethod
    def sample(self, index: int) -> int:
        """The row that is the `index`-th of training."""

    @abstractmethod
    def passes(self, samples: int) -> dict[str, float]:
        """How often so many samples go through the rows of training, by source ("" where there is one)."""

    def held_out(self) -> dict[str, list[int]]:
        """The rows to measure on, by source."""
        return {"": self.holdout}

    def arranged(self, rows: list[int]) -> list[int]:
        """The rows of one step in the order in which they are worked on."""
        return rows

    def of_step(self, step: int, rows: int, rank: int, world: int) -> list[Row]:
        """Process `rank`'s share of the `rows` rows of step `step`.

        Which rows a step takes does not depend on `world`. Every process gets the same number; some may be empty.
        """
        return self.share([self.sample(step * rows + offset) for offset in range(rows)], rank, world)

    def share(self, rows: list[int], rank: int, world: int) -> list[Row]:
        mine = [self.at(row) for row in self.arranged(rows)[rank::world]]
        return mine + [self.empty()] * (-(-len(rows) // world) - len(mine))


class ShuffledRows(Rows):
    """Rows of one source: the held-out ones are spread evenly over it, those for `training` shuffled anew for each epoch.

    `seed` and the `number` of the source decide how.
    """

    def __init__(self, total: int, holdout: int, seed: int, number: int = 0) -> None:
        held = min(holdout, total // 10)
        self.total, self.seed, self.number = total, seed, number
        self.holdout = [(2 * index + 1) * total // (2 * held) for index in range(held)]
        self.training = np.delete(np.arange(total, dtype=np.uint32 if total < 2**32 else np.int64), self.holdout)
        self._orders: dict[int, np.ndarray] = {}

    def sample(self, index: int) -> int:
        """Counted over epochs; each epoch is its own permutation."""
        epoch, offset = divmod(index, len(self.training))
        return int(self._order(epoch)[offset])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:  # a step may begin in one epoch and end in the next, so two are kept
            last = {known: order for known, order in self._orders.items() if known == epoch - 1}
            generator = np.random.default_rng([self.seed, epoch, self.number])
            self._orders = last | {epoch: generator.permutation(self.training)}
        return self._orders[epoch]

    def passes(self, samples: int) -> dict[str, float]:
        return {"": samples / len(self.training)}


class TextRows(ShuffledRows):
    """The tokens of `shards` side by side: row k is k·length … (k+1)·length, so every row has the same length."""

    def __init__(
        self, shards: Shards, length: int, holdout: int, seed: int, document_mask: bool = True, number: int = 0
    ) -> None:
        self.shards, self.length, self.document_mask = shards, length, document_mask
        super().__init__((shards.tokens - 1) // length, holdout, seed, number)
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
