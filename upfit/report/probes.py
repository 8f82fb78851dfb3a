"""Probes in tables and plots: scores and losses by length and depth, gaps beside what chance would give, all models together.

Reads what `upfit evaluate` tells of a probe, in one of three forms: rows by `lengths`, with scores and nats at `depths`
(val-document and its like; position, which has nats alone); rows by `splits` (counting and its like); or one row (needle).
"""

from collections.abc import Callable
from typing import Any

from upfit.evaluate.tables import half_width, interval
from upfit.report import depths, wording
from upfit.report.page import Plot, Section, Table
from upfit.report.subjects import Measured

Probed = list[tuple[str, dict[str, Any]]]  # label of a model, what it tells of one probe


def columns(models: list[Measured]) -> list[tuple[str, list[str]]]:
    """For the summary: [title, a cell for each model] of every probe. Of several lengths the longest that all were given."""
    named = []
    for name in _names(models):
        records = [(model.subject.get("probes") or {}).get(name) for model in models]
        present = [record for record in records if record is not None]
        if "lengths" in present[0]:
            common = set.intersection(*(set(record["lengths"]) for record in present)) or set(present[0]["lengths"])
            length = max(common, key=int)
            cells = ["" if record is None else _cell(record["lengths"].get(length, {}), record) for record in records]
            named.append((f"{name}, {int(length):,} tokens", cells))
        else:
            split = next(iter(present[0].get("splits", {"": None})))
            rows = [None if record is None else record.get("splits", {"": record}).get(split) for record in records]
            cells = ["" if row is None else half_width(row["accuracy"], 2) for row in rows]
            named.append((f"{name}, {split}" if split else name, cells))
    return named


def _cell(row: dict[str, Any], probe: dict[str, Any]) -> str:
    """`0.62 [0.55, 0.69], gap 0.31, trained on`; nats where there is no score."""
    words = [interval(row["average"], 2)] if "average" in row else []
    if not words and "nats_per_token" in row:
        words = [f"{half_width(row['nats_per_token'], 3)} nats"]
    words += [f"gap {row['gap']['mean']:.2f}"] if "gap" in row else []
    return ", ".join(words + (["trained on"] if words and probe.get("trained_on") else []))


def sections(models: list[Measured], number: int) -> list[Section]:
    """One section for each probe that any of the models was given."""
    sections = []
    labels = [model.label for model in models]
    for name in _names(models):
        probed = [
            (model.label, model.subject["probes"][name]) for model in models if name in (model.subject.get("probes") or {})
        ]
        if "lengths" in probed[0][1]:
            sections.append(_by_length(name, probed, labels, number))
        else:
            sections.append(_by_split(name, probed, labels, number))
    return sections


def _names(models: list[Measured]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.subject.get("probes") or {}))


def _by_split(name: str, probed: Probed, labels: list[str], number: int) -> Section:
    rows = []
    for label, probe in probed:
        for split, row in probe.get("splits", {"": probe}).items():
            loss = row.get("answer_nats_per_token") or row["nats_per_answer"]
            rows.append([f"{label} {split}".strip(), half_width(row["accuracy"], 3), half_width(loss, 3)])
    table = Table(f"Probe: {name}", ["model", "right", "nats per answer"], rows)
    curves = [
        (label, [float(depth) for depth in probe["accuracy_by_depth"]], list(probe["accuracy_by_depth"].values()))
        for label, probe in probed
        if "accuracy_by_depth" in probe
    ]
    plots = []
    if curves:
        drawn = depths.curves(curves, labels, "share found", "depth of the needle, 0 is the beginning", whole=True)
        plots.append(
            Plot(
                f"{name}-depth-{number}",
                wording.FOUND.format(name=name),
                drawn,
            )
        )
    return Section(f"Probe: {name}", tables=[table], plots=plots)


def _by_length(name: str, probed: Probed, labels: list[str], number: int) -> Section:
    probe = probed[0][1]
    texts = [_pattern(probe["pattern"], probed)] if "pattern" in probe else []
    scored = any("average" in row for _, record in probed for row in record["lengths"].values())
    columns, rows = _scores(probed) if scored else _losses(probed)
    if not any(cells[-1] for cells in rows):  # nobody tells whether it was trained on
        columns, rows = columns[:-1], [cells[:-1] for cells in rows]
    table = Table(f"Probe: {name}", columns, rows)
    return Section(f"Probe: {name}", texts, tables=[table], plots=_plots(name, probed, labels, number))


def _pattern(pattern: str, probed: Probed) -> str:
    """Who was taught the pattern that the probe asks for."""
    taught = [label for label, record in probed if record.get("trained_on")]
    unknown = [label for label, record in probed if "trained_on" not in record]
    words = f"Pattern: {pattern}. " + (f"Trained on by: {', '.join(taught)}." if taught else "No model's recipe trained on it.")
    return words + (f" Not told: {', '.join(unknown)}." if unknown else "")


def _rows(probed: Probed, cells: Callable[[dict[str, Any]], list[str]]) -> list[list[str]]:
    """A row for each model and length, lengths in order, models beside each other."""
    lengths = sorted({length for _, probe in probed for length in probe["lengths"]}, key=int)
    return [
        [f"{label}, {int(length):,} tokens", *cells(probe["lengths"][length]), _trained(probe)]
        for length in lengths
        for label, probe in probed
        if length in probe["lengths"]
    ]


def _scores(probed: Probed) -> tuple[list[str], list[list[str]]]:
    columns = ["model", "average", "floor", "gap", "null gap (95 %)", "p"]
    columns += ["nats per answer token", "its gap", "null gap (95 %)", "p", "trained on"]

    def cells(row: dict[str, Any]) -> list[str]:
        loss = half_width(row["answer_nats_per_token"], 3) if "answer_nats_per_token" in row else ""
        return [_interval(row, "average"), _number(row.get("floor")), *_gap(row, ""), loss, *_gap(row, "nats_")]

    return columns, _rows(probed, cells)


def _losses(probed: Probed) -> tuple[list[str], list[list[str]]]:
    def cells(row: dict[str, Any]) -> list[str]:
        return [half_width(row["nats_per_token"], 4) if "nats_per_token" in row else "", str(row.get("windows", ""))]

    return ["model", "nats a token", "windows", "trained on"], _rows(probed, cells)


def _gap(row: dict[str, Any], prefix: str) -> list[str]:
    null = row.get(f"{prefix}null_gap") or {}
    return [_interval(row, f"{prefix}gap"), _number(null.get("p95")), _number(row.get(f"{prefix}p_value"))]


def _interval(row: dict[str, Any], name: str) -> str:
    return interval(row[name], 3) if row.get(name) else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _trained(probe: dict[str, Any]) -> str:
    return {True: "yes", False: "no", None: ""}[probe.get("trained_on")]


def _plots(name: str, probed: Probed, labels: list[str], number: int) -> list[Plot]:
    """Heat maps where there are several lengths, curves where there is one; a loss by position is always a curve."""
    plots = []
    lengths = sorted({length for _, probe in probed for length in probe["lengths"]}, key=int)
    for kind, what in (("scores", "score"), ("nats", "nats a token")):
        drawable = [
            (label, {n: r for n, r in probe["lengths"].items() if kind in r and "depths" in r}) for label, probe in probed
        ]
        drawable = [(label, rows) for label, rows in drawable if rows]
        if not drawable:
            continue
        caption = wording.CURVES.format(name=name, what=what)
        if len(lengths) > 1 and any("scores" in row for _, rows in drawable for row in rows.values()):
            caption = wording.HEAT.format(name=name, what=what)
            drawn = depths.heat_maps(drawable, lengths, kind, what)
        else:
            drawn = depths.by_length(drawable, lengths, kind, what, labels)
        plots.append(Plot(f"{name}-{kind}-{number}", caption, drawn))
    return plots
