"""What a conversion saved and what that cost, in words and cells: the same ones in the report, the card and `compare`.

`stages.py` makes it from the records. What was not measured of a model is None there, and is said so here.
"""

from dataclasses import dataclass
from typing import Any

from upfit.evaluate.tables import half_width
from upfit.output import cache_factor, cache_size, human_bytes

DIGITS = 4  # of a loss in nats, wherever it stands


@dataclass(frozen=True)
class Cache:
    """Of one sequence, in bytes. `window`: the largest sliding window, in tokens; `beyond`: bytes a token past it, where known.

    `types`: what it was measured in; none where it is told by the shapes and types of the weights. `per_position`: of an
    encoder-decoder, what its cross-attention keeps of each position that was read; `per_token` is then of a token written.
    """

    per_token: float
    fixed: float = 0.0
    window: int | None = None
    beyond: float | None = None
    types: tuple[str, ...] = ()
    per_position: float | None = None

    def same(self, other: "Cache") -> bool:
        """Whether both keep as much of each token, and of each position that was read."""
        return (self.per_token, self.per_position) == (other.per_token, other.per_position)

    def at(self, tokens: int) -> float | None:
        """Bytes of a context of `tokens`; None where that is not known."""
        inside = tokens if self.window is None else min(tokens, self.window)
        if inside < tokens and self.beyond is None:
            return None
        return self.fixed + inside * self.per_token + (tokens - inside) * (self.beyond or 0.0)


@dataclass(frozen=True)
class Lost:
    """A loss less the source's on the same windows. `estimate`: mean, low and high; without ends where it is not paired."""

    estimate: dict[str, Any]
    unit: str = "nats a token"

    @property
    def paired(self) -> bool:
        return self.estimate["low"] is not None

    def cell(self) -> str:
        unit = "" if self.unit == "nats a token" else f" {self.unit}"
        return half_width(self.estimate, DIGITS) + unit + ("" if self.paired else ", not paired")

    def words(self) -> str:
        """`0.1757 ± 0.0916 nats a token higher`."""
        mean, low, high = (self.estimate[key] for key in ("mean", "low", "high"))
        if mean == low == high == 0:
            return "the same"
        size = self.estimate if mean >= 0 else {"mean": -mean, "low": None if high is None else -high}
        doubt = ", which may be chance" if self.paired and low <= 0 <= high else "" if self.paired else " (not paired)"
        return f"{half_width(size, DIGITS)} {self.unit} {'higher' if mean >= 0 else 'lower'}{doubt}"


@dataclass(frozen=True)
class Agreement:
    """How near the predictions are to the source's. `cell`: in a table; `words`: in a sentence; `note`: what it is."""

    cell: str
    words: str
    note: str


@dataclass(frozen=True)
class Wrong:
    """Words that a model got wrong: its word error rate, and that less the source's on the same recordings, paired, where it is
    known. Both as shares of the words."""

    rate: dict[str, Any]
    more: dict[str, Any] | None = None

    def words(self) -> str:
        more = "" if self.more is None else f" ({points(self.more)} points against the source's)"
        return f"its word error rate is {points(self.rate)} %{more}"


def points(share: dict[str, Any]) -> str:
    """A share with its interval, in hundredths: `12.34 ± 1.20`."""
    return half_width({key: None if end is None else 100 * end for key, end in share.items()}, 2)


@dataclass(frozen=True)
class Stage:
    """A model on the way: `label` is source, converted or uptrained; `loss` an estimate in nats a token, of an encoder-decoder
    given what it read; `wrong` what one that hears made of recordings."""

    label: str
    name: str
    cache: Cache | None
    loss: dict[str, Any] | None = None
    lost: Lost | None = None
    agreement: Agreement | None = None
    wrong: Wrong | None = None


@dataclass(frozen=True)
class Outcome:
    """`stages`: from the source to the folder as it is. `context`: the longest that the model takes, in tokens. `data`: the
    text that losses are of, as `evaluate` tells it; None where nothing was measured."""

    stages: list[Stage]
    context: int | None
    data: dict[str, Any] | None

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    def sentence(self, model: str, source: str) -> str:
        """What was saved and what it cost; `model` and `source` say what the two are called."""
        return f"{self._saved(model, source)}, {self._cost()}."

    def _saved(self, model: str, source: str) -> str:
        before, after = self.stages[0].cache, self.last.cache
        if before is None or after is None:
            return f"What {model} keeps in its cache was not measured"
        if before.per_position is not None and after.per_position is not None:
            return _both_saved(model, source, before, after)
        if before.per_token == after.per_token:
            return f"{model} keeps {human_bytes(after.per_token)} of KV cache a token, as {source} does"
        factor = cache_factor(before.per_token, after.per_token)
        saved = f"{model} keeps {human_bytes(after.per_token)} of KV cache a token where {source} keeps "
        saved += human_bytes(before.per_token) + (f" ({factor})" if factor else "")
        long = [None if self.context is None else cache.at(self.context) for cache in (before, after)]
        if self.context is None or long[0] is None or long[1] is None:
            return saved
        return f"{saved}, {human_bytes(long[1])} instead of {human_bytes(long[0])} at {self.context:,} tokens"

    def _cost(self) -> str:
        lost, wrong = self.last.lost, self.last.wrong
        loss = f"its loss{' given what is read' if self.data and 'examples' in self.data else ''}"
        cost = "and its loss was not measured" if lost is None else f"and {loss} is {lost.words()}"
        return "; ".join(
            [cost, *([wrong.words()] if wrong else []), *([self.last.agreement.words] if self.last.agreement else [])]
        )


def _both_saved(model: str, source: str, before: Cache, after: Cache) -> str:
    """Of an encoder-decoder: what its self-attention and its cross-attention keep."""
    assert before.per_position is not None and after.per_position is not None
    if before.same(after):
        return f"{model} keeps {cache_size(after.per_token, after.per_position)} in its KV caches, as {source} does"
    pairs = [(before.per_token, after.per_token), (before.per_position, after.per_position)]
    factors = [f" ({factor})" if (factor := cache_factor(*pair)) else "" for pair in pairs]
    return (
        f"{model} keeps {human_bytes(after.per_token)} of KV cache a token written where {source} keeps "
        f"{human_bytes(before.per_token)}{factors[0]}, and {human_bytes(after.per_position)} a position read instead of "
        f"{human_bytes(before.per_position)}{factors[1]}"
    )
