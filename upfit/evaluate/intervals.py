"""Means over windows and their confidence intervals. Numbers in, numbers out.

A mean loss is a ratio: the sum of what the windows cost over the sum of what they weigh (tokens, or bytes). Its standard
error comes from the windows' residuals (the linearised, or Taylor, variance of a ratio estimator: Cochran, Sampling
Techniques, 3rd ed., section 6.4), which for windows of equal weight is the textbook s / sqrt(n).
"""

import math

import numpy as np
from scipy import stats

from upfit.evaluate.interval import Interval

CONFIDENCE = 0.95


def mean_interval(costs: np.ndarray, weights: np.ndarray) -> Interval:
    """Sum of `costs` [windows] over sum of `weights` [windows], with its t-interval over windows."""
    value = float(costs.sum() / weights.sum())
    return _t_interval(value, (costs - value * weights) / weights.sum())


def difference_interval(costs: np.ndarray, weights: np.ndarray, other_costs: np.ndarray, other_weights: np.ndarray) -> Interval:
    """First mean minus second mean, paired: entry i of all four arrays [windows] belongs to the same text."""
    mean, other = costs.sum() / weights.sum(), other_costs.sum() / other_weights.sum()
    residuals = (costs - mean * weights) / weights.sum()
    other_residuals = (other_costs - other * other_weights) / other_weights.sum()
    return _t_interval(float(mean - other), residuals - other_residuals)


def _t_interval(value: float, residuals: np.ndarray) -> Interval:
    """`residuals` [windows] are the windows' shares in the error of `value`; they sum to 0."""
    count = len(residuals)
    if count < 2:
        return Interval(value, None, None)
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum()))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    return Interval(value, value - half, value + half)
