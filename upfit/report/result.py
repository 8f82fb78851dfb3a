"""What `upfit report` and `compare` answer."""

from dataclasses import dataclass
from typing import Any

from upfit.output import Output
from upfit.results import Part, Result, absent, beside

COLUMNS = ("model", "parameters", "KV heads", "KV a token", "trained on", "nats per token", "against source")
OF_SOME = ("KV a position read", "word errors", "points more")  # of encoder-decoders, and of those that hear


@dataclass(frozen=True, repr=False)
class Report(Result):
    """The page that was written.

    out: its place
    sections: titles of its sections
    plots: pictures that were written beside it
    png: the folder of the pictures as it was given (not in the record)
    """

    out: str
    sections: list[str]
    plots: list[str]
    png: str | None = beside()

    def show(self, output: Output) -> None:
        output.line(f"Wrote {self.out}" + (f" and {len(self.plots)} plots to {self.png}" if self.png else ""))


@dataclass(frozen=True)
class Group(Part):
    """Models that were measured on one text.

    title: the text, in words
    data: the text, as `evaluate` tells it; None for models that were not measured
    rows: a row for each model, in words, by the columns of the table
    columns: their titles, where there are more than every table has: of encoder-decoders, and of models that hear
    """

    title: str
    data: dict[str, Any] | None
    rows: list[list[str]]
    columns: list[str] | None = absent()


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Several models side by side.

    groups: a table for each text that they were measured on
    """

    groups: list[Group]

    def record(self) -> list[dict[str, Any]]:
        return [group.record() for group in self.groups]

    def show(self, output: Output) -> None:
        for group in self.groups:
            output.table(group.columns or list(COLUMNS), group.rows, group.title)
