"""Scores an answer: exact match, partial match, and FILM's metrics. Strings in, numbers from 0 to 1 out.

FILM's metrics (arXiv 2404.16811, section 3, and the authors' `plot.py`) are kept as they are, faults included, so that figures
can be compared with published ones; nothing else uses them.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

OUTER = " \t\n\"'`.,;"  # white space and marks around an answer that do not make it another one
FILM_BIN = 50  # positions


def strict(answer: str, reply: str) -> float:
    """Whether the answer was given and nothing else, white space and outer marks aside."""
    return float(_bare(answer) == _bare(reply))


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(OUTER)


def share_said(key: str, parts: Sequence[str], reply: str) -> float:
    """Which share of the parts is said, as whole words."""
    return float(np.mean([re.search(rf"(?<!\w){re.escape(part)}(?!\w)", reply) is not None for part in parts]))


def beyond_key(key: str, parts: Sequence[str], reply: str) -> float:
    """Of a sentence's words before and after its key, the share that is said, in order: an echo of the question scores 0."""
    before, _, after = " ".join(parts[0].split()).partition(" ".join(key.split()))
    wanted = before.split() + after.split()
    return common_in_order(wanted, reply.split()) / max(1, len(wanted))


def common_in_order(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = np.zeros(len(second) + 1, dtype=np.int64)
    for word in first:
        longer = row.copy()
        longer[1:] = np.maximum(longer[1:], row[:-1] + [word == other for other in second])
        row = np.maximum.accumulate(longer)
    return int(row[-1])


def film_words(parts: Sequence[str], reply: str) -> float:
    """Document: share of the different words of the sentence that are said, in any order."""
    wanted = set(parts[0].lower().split())
    return len(wanted & set(reply.lower().split())) / len(wanted)


def film_substring(parts: Sequence[str], reply: str) -> float:
    """Code: the name stands somewhere in what is said (the paper says exact match, the code does this)."""
    return float(parts[0].strip(".") in reply)


def film_either(parts: Sequence[str], reply: str) -> float:
    """Database: label or description stands in what is said."""
    return float(any(part.strip(".").lower() in reply.lower() for part in parts))


FilmScore = Callable[[Sequence[str], str], float]


def film_bins(positions: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """Means of FILM's bins of 50 positions for each context; `positions`, `scores` [contexts, questions].

    As in `plot.py` the last position of each bin is left out, and a mean is first taken in each context. A list over bins that
    hold any question, of the means [contexts that have one there].
    """
    bins = []
    for start in range(0, int(positions.max()) + 1, FILM_BIN):
        inside = (positions >= start) & (positions < start + FILM_BIN - 1)
        means = [row[inside_row].mean() for row, inside_row in zip(scores, inside, strict=True) if inside_row.any()]
        if means:
            bins.append(np.array(means))
    return bins
