"""What was measured of encoder-decoders alone: the cache of what is read, and words that are heard."""

from typing import Any

from upfit.output import human_bytes
from upfit.report.outcome import points
from upfit.report.page import Table
from upfit.report.subjects import Measured, Text

PARTS = ("substituted", "missing", "added", "words")


def columns(models: list[Measured]) -> list[tuple[str, list[str]]]:
    """For the summary: [title, a cell for each model]; none for decoders."""
    cells = {"cache a position read": [_read(model)[0] for model in models], "word error rate": [_rate(m) for m in models]}
    return [(title, column) for title, column in cells.items() if any(column)]


def tables(text: Text) -> list[Table]:
    """Both caches, and wrong words with their difference from the source's, paired by recording."""
    shown: list[Table] = []
    if any(model.subject.get("cross_cache") for model in text.models):
        rows = [[model.label, *_written(model), *_read(model)] for model in text.models]
        columns = ["model", "a token written", "type", "a position read", "all that was read", "positions"]
        shown.append(
            Table("Caches of one sequence: self-attention keeps what is written, cross-attention what was read", columns, rows)
        )
    if any(model.subject.get("word_errors") for model in text.models):
        rows = [[model.label, _rate(model), _more(model, text), *_counts(model)] for model in text.models]
        columns = ["model", "word error rate", "points against the source", "substituted", "missing", "added", "of words"]
        shown.append(Table("Words written greedily, without case and punctuation", columns, rows))
    return shown


def _written(model: Measured) -> list[str]:
    cache = model.subject["cache"]
    return ["none", ""] if cache is None else [human_bytes(cache["bytes_per_token"]), " ".join(cache.get("dtypes", ()))]


def _read(model: Measured) -> list[str]:
    """Bytes a position, bytes of all of them, and how many there were."""
    cache = model.subject.get("cross_cache")
    if not cache:
        return ["", "", ""]
    return [human_bytes(cache["bytes_per_position"]), human_bytes(cache["bytes"]), f"{cache['positions']:,}"]


def _rate(model: Measured) -> str:
    heard = model.subject.get("word_errors")
    return f"{points(heard['rate'])} %" if heard else ""


def _counts(model: Measured) -> list[str]:
    heard: dict[str, Any] = model.subject.get("word_errors") or {}
    return [str(heard.get(name, "")) for name in PARTS]


def _more(model: Measured, text: Text) -> str:
    """Of the newest evaluation of the model beside another; says which one, where that is not the one source."""
    differences = [answer.get("word_error_difference") for label, answer in text.evaluations if label == model.label]
    paired = [difference for difference in differences if difference]
    if not paired:
        return ""
    return points(paired[-1]) + ("" if model.against == text.source else f" (from {model.against})")
