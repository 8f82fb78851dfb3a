"""Mixes rows of several sources in fixed shares. The number of a row decides its source, so there is nothing to save for a
resumed run, and nothing to agree on between processes."""

import numpy as np

from upfit.uptrain.data.rows import Row, Rows


def interleave(weights: list[int]) -> np.ndarray:
    """The source of each of Σ weights rows in a row, int16; then it begins anew.

    After any n rows a source of share s has given ⌊s·n⌋ or ⌈s·n⌉. Its j-th row (from 0) may come no earlier than ⌊j/s⌋ and must
    come before ⌈(j+1)/s⌉; of those that may, the one that must come first is taken, which always succeeds (the windows of
    Baruah et al. 1996, Proportionate Progress, on one processor).
    """
    period = sum(weights)
    taken = [0] * len(weights)
    order = np.empty(period, dtype=np.int16)
    for at in range(period):
        ready = [i for i, weight in enumerate(weights) if taken[i] * period // weight <= at]
        order[at] = chosen = min(ready, key=lambda i: -(-(taken[i] + 1) * period // weights[i]))
        taken[chosen] += 1
    return order


class InterleavedRows(Rows):
    """Rows of `sources`, each with its own order, in shares as whole numbers (`weights`). Row numbers count through them."""

    def __init__(self, sources: dict[str, Rows], weights: list[int]) -> None:
        self.sources, self.weights = sources, weights
        self.members = list(sources.values())
        self.starts = np.cumsum([0, *(rows.total for rows in self.members)])
        self.total = int(self.starts[-1])
        self.order = interleave(weights)
        self.row_numbers = np.empty(len(self.order), dtype=np.int64)  # which row of its source each is
        for number, weight in enumerate(weights):
            self.row_numbers[self.order == number] = np.arange(weight)
        self.holdout = [
            int(start) + row for start, rows in zip(self.starts, self.members, strict=False) for row in rows.holdout
        ]

    def at(self, row: int) -> Row:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.members[number].at(row - int(self.starts[number]))

    def empty(self) -> Row:
        return self.members[0].empty()

    def sample(self, index: int) -> int:
        turn, at = divmod(index, len(self.order))
        number = int(self.order[at])
        return int(self.starts[number]) + self.members[number].sample(turn * self.weights[number] + int(self.row_numbers[at]))

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` rows each source gives."""
        turns, rest = divmod(samples, len(self.order))
        return [turns * weight + int((self.order[:rest] == number).sum()) for number, weight in enumerate(self.weights)]

    def passes(self, samples: int) -> dict[str, float]:
        shares = zip(self.sources.items(), self.counts(samples), strict=True)
        return {name: rows.passes(count)[""] for (name, rows), count in shares}

    def held_out(self) -> dict[str, list[int]]:
        starts = zip(self.sources.items(), self.starts.tolist(), strict=False)
        return {name: [start + row for row in rows.holdout] for (name, rows), start in starts}
