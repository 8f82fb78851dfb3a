"""Chooses the rows of each step: rows of the text, or answers and, beside them, rows of general text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upfit.uptrain.data.rows import IGNORE, Row, Rows

MAIN, MIX = "", "mix_"  # prefixes of the metrics of a group of rows
MOST_PASSES = 4  # up to which repeated text is worth almost as much as new text (Muennighoff et al. 2023, arXiv 2305.16264)


@dataclass(frozen=True)
class RowGroup:
    """Rows of one kind in a step, of this process. `weight` is that of their mean loss in the loss of the step.

    `source` where all of them are of one of several sources.
    """

    name: str
    rows: list[Row]
    weight: float = 1.0
    source: str = ""

    @property
    def labels(self) -> int:
        return sum(row.supervised for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens read; rows that only fill up a process are none."""
        return sum(row.tokens for row in self.rows)


@dataclass(frozen=True)
class StepSampler:
    """`rows` rows of `main` a step, and `mix_rows` of `mix` where there is one.

    Answers are a few tokens of thousands and general text is all labels: each group's loss is a mean over its own labels, so
    that neither drowns the other.
    """

    main: Rows
    rows: int
    mix: Rows | None = None
    mix_rows: int = 0
    mix_weight: float = 1.0

    @property
    def names(self) -> list[str]:
        return [MAIN] if self.mix is None else [MAIN, MIX]

    def of_step(self, step: int, rank: int, world: int) -> list[RowGroup]:
        """Process `rank`'s share of step `step`."""
        groups = [RowGroup(MAIN, self.main.of_step(step, self.rows, rank, world))]
        if self.mix is not None:
            groups.append(RowGroup(MIX, self.mix.of_step(step, self.mix_rows, rank, world), self.mix_weight))
        return groups

    def held_out(self, rank: int, world: int) -> list[RowGroup]:
        """Process `rank`'s share of the rows that are never trained on; those of each source are a group."""
        kinds = [(MAIN, self.main), *([(MIX, self.mix)] if self.mix is not None else [])]
        return [
            RowGroup(name, rows.share(numbers, rank, world), source=source)
            for name, rows in kinds
            for source, numbers in rows.held_out().items()
        ]

    def passes(self, steps: int) -> str:
        """How often `steps` steps go over the data, in words."""
        passes = self.main.passes(steps * self.rows)
        if len(passes) == 1:
            return f"{next(iter(passes.values())):.2f} passes over the data"
        return "passes over the data: " + ", ".join(f"{name} {count:.2f}" for name, count in passes.items())

    def repeated(self, steps: int) -> list[str]:
        """What to say of data that `steps` steps go over too often."""
        passes = {name or "the data": count for name, count in self.main.passes(steps * self.rows).items()}
        mixed = {} if self.mix is None else self.mix.passes(steps * self.mix_rows)
        passes |= {f"{name or 'the text'} mixed in": count for name, count in mixed.items()}
        return [
            f"{name} is gone over {count:.1f} times; after {MOST_PASSES} the same text teaches ever less (arXiv 2305.16264)"
            for name, count in passes.items()
            if count > MOST_PASSES
        ]


def averages(
    groups: list[RowGroup], sums: list[list[float]], metrics: Callable[[list[float]], dict[str, Any]]
) -> dict[str, Any]:
    """`metrics` of the means over the rows of each name, and of each source as `code/ce`; the last sum of a group is that of
    its labels."""
    totals: dict[str, np.ndarray] = {}
    for group, row in zip(groups, sums, strict=True):
        for name in (group.name, f"{group.name}{group.source}/") if group.source else (group.name,):
            totals[name] = totals.get(name, np.zeros(len(row))) + row
    means = {name: metrics((total[:-1] / total[-1]).tolist()) for name, total in totals.items() if total[-1]}
    return {f"{name}{key}": value for name, values in means.items() for key, value in values.items()}


def micro_batches(rows: list[Row], most: int | None, tokens: int) -> Iterator[list[Row]]:
    """Neighbours together: `most` rows at a time, or (None) as many as have at most `tokens` tokens, padding counted."""
    batch: list[Row] = []
    for row in rows:
        longest = max(len(each.input_ids) for each in (*batch, row))
        if batch and (len(batch) == most if most is not None else (len(batch) + 1) * longest > tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def tensors(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and labels of some rows, [B, T] each (of an encoder-decoder, ids have a length of their own). Shorter rows
    are filled up at their end, where a causal model's real tokens do not look, with positions that go on and labels that do
    not count."""
    longest = max(len(row.labels) for row in rows)
    ids = np.zeros((len(rows), max(len(row.input_ids) for row in rows)), dtype=np.int64)
    positions, labels = np.zeros((len(rows), longest), dtype=np.int64), np.full((len(rows), longest), IGNORE)
    for at, row in enumerate(rows):
        size = len(row.labels)
        ids[at, : len(row.input_ids)], labels[at, :size], positions[at, :size] = row.input_ids, row.labels, row.position_ids
        positions[at, size:] = row.position_ids[-1] + 1 + np.arange(longest - size)
    on_device = (torch.from_numpy(array).to(device, non_blocking=True) for array in (ids, positions, labels))
    return next(on_device), next(on_device), next(on_device)
