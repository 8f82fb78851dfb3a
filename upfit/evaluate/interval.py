"""A measured value with its interval of 95 %, over windows, samples, contexts or documents."""

import math
import sys
from dataclasses import dataclass

from upfit.results import Part


@dataclass(frozen=True)
class Interval(Part):
    """A value with its interval.

    mean: the value
    low: the lower end; None where there is no interval
    high: the upper end
    """

    mean: float
    low: float | None
    high: float | None

    def exp(self) -> "Interval":
        """The perplexity of a loss: exp is monotone, so the ends of the interval stay ends of an interval."""
        low, high = (None if end is None else _exp(end) for end in (self.low, self.high))
        return Interval(_exp(self.mean), low, high)

    def ends(self, digits: int) -> str:
        """`36.87 [31.93, 42.58]`, no decimals from 1000 on; without the brackets where there is no interval."""
        digits = digits if self.mean < 1000 else 0
        return f"{self.mean:.{digits}f}" + ("" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]")

    def half_width(self, digits: int) -> str:
        """`3.6074 ± 0.1440`, for an interval that is symmetric."""
        return f"{self.mean:.{digits}f}" + ("" if self.low is None else f" ± {self.mean - self.low:.{digits}f}")


def _exp(value: float) -> float:
    """e ** value; the largest float where that is too large for one (a broken model), so that JSON can hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return sys.float_info.max
