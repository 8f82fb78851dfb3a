"""Scores by depth and what they can prove. Numbers in, numbers out; shapes: C contexts, D depths.

The gap is the best depth's mean minus the worst's (VaL probing, arXiv 2404.16811). It is above 0 for any finite sample, so it
stands beside the gap that scores without an effect of depth would show: those of each context dealt out again over the depths.
Questions of one context are not independent of each other, so intervals draw whole contexts again (a cluster bootstrap).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from upfit.evaluate.interval import Interval
from upfit.evaluate.intervals import CONFIDENCE, difference_interval, mean_interval
from upfit.evaluate.probes.summaries import NullGap

ROUNDS = 2000
SEED = 20240426


@dataclass(frozen=True)
class Gap:
    """`value` with the ends of its interval, what no effect of depth would give, and how likely a gap as large as this one is
    then."""

    value: Interval
    null: NullGap
    p_value: float


def average(values_CD: np.ndarray) -> Interval:
    """Mean over all questions, with its t-interval over contexts."""
    return mean_interval(values_CD.mean(1), np.ones(len(values_CD)))


def gap(values_CD: np.ndarray) -> Gap:
    """The gap, its interval and its null. The interval says where the gap of other contexts would be, upward bias and all."""
    draw = np.random.default_rng(SEED)
    value = float(np.ptp(values_CD.mean(0)))
    null = np.array([np.ptp(draw.permuted(values_CD, axis=1).mean(0)) for _ in range(ROUNDS)])
    p_value = (1 + int((null >= value - 1e-12).sum())) / (1 + ROUNDS)  # the sample is one of the deals
    drawn = np.ptp(_redrawn(len(values_CD)) @ values_CD, axis=1)
    return Gap(_percentiles(value, drawn, len(values_CD)), NullGap(float(null.mean()), float(np.quantile(null, 0.95))), p_value)


def compared(first_CD: np.ndarray, second_CD: np.ndarray) -> dict[str, Any]:
    """First minus second on the same questions: of the averages (t-interval over contexts) and of the gaps (bootstrap)."""
    ones, weights = np.ones(len(first_CD)), _redrawn(len(first_CD))
    differences = np.ptp(weights @ first_CD, axis=1) - np.ptp(weights @ second_CD, axis=1)
    value = float(np.ptp(first_CD.mean(0)) - np.ptp(second_CD.mean(0)))
    return {
        "average": difference_interval(first_CD.mean(1), ones, second_CD.mean(1), ones).record(),
        "gap": _percentiles(value, differences, len(first_CD)).record(),
    }


def _redrawn(contexts: int) -> np.ndarray:
    """[ROUNDS, C]: how much of each context is in a sample of as many, drawn with replacement."""
    return np.random.default_rng(SEED).multinomial(contexts, np.full(contexts, 1 / contexts), ROUNDS) / contexts


def _percentiles(value: float, drawn: np.ndarray, contexts: int) -> Interval:
    """One context says nothing of others."""
    if contexts < 2:
        return Interval(value, None, None)
    low, high = np.quantile(drawn, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(value, float(low), float(high))
