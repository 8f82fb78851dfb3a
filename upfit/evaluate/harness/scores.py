"""What a model scored in a task of lm-evaluation-harness, document by document, and the intervals of it. No harness in here."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from upfit.evaluate.interval import Interval
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.measures import TaskScores

# How the harness's aggregations make one number of the documents' values: (sign and scale of a value, e ** the mean?).
# Values are numbers, or (number, weight). Others (F1, BLEU, a task's own) have no interval here.
MEANS: dict[str, tuple[float, bool]] = {
    "mean": (1.0, False),
    "perplexity": (-1.0, True),
    "weighted_perplexity": (-1.0, True),
    "bits_per_byte": (-1 / math.log(2), False),
}


@dataclass(frozen=True)
class Metric:
    """`costs` and `weights` [documents], whose ratio of sums (or e to it: `exp`) is `value`; None where it is no such mean."""

    value: float
    costs: np.ndarray | None = None
    weights: np.ndarray | None = None
    exp: bool = False

    def estimate(self) -> Interval:
        if self.costs is None or self.weights is None:
            return Interval(self.value, None, None)
        mean = mean_interval(self.costs, self.weights)
        return mean.exp() if self.exp else mean


@dataclass(frozen=True)
class Scores:
    """One task, of a version of the `harness`: `documents` are digests of what was asked, in order."""

    harness: str
    task: str
    length: int | None
    version: Any
    shots: int | None
    documents: list[str]
    metrics: dict[str, Metric]

    def summary(self) -> TaskScores:
        return TaskScores(
            harness=self.harness,
            task=self.task,
            length=self.length,
            version=self.version,
            few_shot=self.shots,
            documents=len(self.documents),
            metrics={name: metric.estimate() for name, metric in self.metrics.items()},
        )


def metric(values: list[Any], aggregation: str, value: float) -> Metric:
    """The documents' `values`, which the harness's `aggregation` made `value` of."""
    if aggregation not in MEANS or not all(map(_countable, values)):
        return Metric(float(value))
    scale, exp = MEANS[aggregation]
    pairs = np.array(
        [weighted if isinstance(weighted, tuple | list) else (weighted, 1) for weighted in values], dtype=np.float64
    )
    return Metric(float(value), scale * pairs[:, 0], pairs[:, 1], exp)


def _countable(value: Any) -> bool:
    numbers = value if isinstance(value, tuple | list) and len(value) == 2 else (value,)
    return all(isinstance(number, bool | int | float | np.number) and math.isfinite(number) for number in numbers)


def differences(first: dict[str, Scores], second: dict[str, Scores]) -> dict[str, dict[str, Interval]]:
    """Of each task: first minus second for each metric, paired by document; of perplexities the ratio."""
    return {label: _compared(scores, second[label]) for label, scores in first.items()}


def _compared(first: Scores, second: Scores) -> dict[str, Interval]:
    assert first.documents == second.documents
    differences: dict[str, Any] = {}
    for name, ours in first.metrics.items():
        other = second.metrics[name]
        if ours.costs is None or ours.weights is None or other.costs is None or other.weights is None:
            differences[name] = Interval(ours.value - other.value, None, None)
            continue
        difference = difference_interval(ours.costs, ours.weights, other.costs, other.weights)
        differences[f"{name}_ratio" if ours.exp else name] = difference.exp() if ours.exp else difference
    return differences
