"""What the steps of a run are made of: rows of the text, or answers and, beside them, rows of general text."""

from collections.abc import Iterator
from dataclasses import dataclass

from upfit.uptrain.rows import Row, Rows

MAIN, MIX = "", "mix_"  # prefixes of what is told of a part


@dataclass(frozen=True)
class Part:
    """Rows of one kind in a step, of this process. `weight` is that of their mean loss in the loss of the step."""

    name: str
    rows: list[Row]
    weight: float = 1.0

    @property
    def labels(self) -> int:
        return sum(row.supervised for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens read; rows that only fill up a process are none."""
        return sum(row.tokens for row in self.rows)


@dataclass(frozen=True)
class Feed:
    """`rows` rows of `main` a step, and `mix_rows` of `mix` where there is one.

    Answers are a few tokens of thousands and general text is all labels: each part's loss is a mean over its own labels, so
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

    def of_step(self, step: int, rank: int, world: int) -> list[Part]:
        """Process `rank`'s share of step `step`."""
        parts = [Part(MAIN, self.main.of_step(step, self.rows, rank, world))]
        if self.mix is not None:
            parts.append(Part(MIX, self.mix.of_step(step, self.mix_rows, rank, world), self.mix_weight))
        return parts

    def held_out(self, rank: int, world: int) -> list[Part]:
        """Process `rank`'s share of the rows that are never trained on."""
        parts = [Part(MAIN, self.main.share(self.main.holdout, rank, world))]
        if self.mix is not None:
            parts.append(Part(MIX, self.mix.share(self.mix.holdout, rank, world)))
        return parts


def micro_batches(rows: list[Row], most: int | None, tokens: int) -> Iterator[list[Row]]:
    """Neighbours together: `most` rows at a time, or (None) as many as have at most `tokens` tokens, padding counted."""
    batch: list[Row] = []
    for row in rows:
        longest = max(len(one.input_ids) for one in (*batch, row))
        if batch and (len(batch) == most if most is not None else (len(batch) + 1) * longest > tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
