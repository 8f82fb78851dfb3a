"""The form of a synthetic task: a row of symbols, and which of them are asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """`tokens` of one sequence. Those at the indices `answers` follow from the ones before them, and are what is scored."""

    tokens: tuple[str, ...]
    answers: tuple[int, ...]

    def trimmed(self, block: int) -> "Item":
        """The last `block` tokens; answers further left are gone."""
        cut = max(0, len(self.tokens) - block)
        return Item(self.tokens[cut:], tuple(at - cut for at in self.answers if at >= cut)) if cut else self

    def text(self) -> tuple[str, list[tuple[int, int]]]:
        """The symbols with spaces between, and where in it each one stands (first character, last + 1)."""
        spans, at = [], 0
        for token in self.tokens:
            spans.append((at, at + len(token)))
            at += len(token) + 1
        return " ".join(self.tokens), spans
