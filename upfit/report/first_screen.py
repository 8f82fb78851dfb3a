"""The head of a report, for who decides: one sentence, a row for each model, one picture. Internals stand further down."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from upfit.evaluate.tables import half_width
from upfit.output import human_bytes
from upfit.report import wording
from upfit.report.figures import series
from upfit.report.outcome import DIGITS, Cache, Outcome, Stage, points
from upfit.report.page import Plot, Section, Table
from upfit.report.wording import where

TITLE = "What was saved, and what it cost"
UNKNOWN = "not measured"
WIDTH = 5.6  # inches: its text can still be read on a telephone


def first_screen(outcome: Outcome) -> Section:
    model, source = outcome.last.name, outcome.stages[0].name
    source = f"its source {source}" if source not in ("", model) else "its source"
    picture = _picture(outcome)
    plots = [] if picture is None else [Plot("saved", picture[0], picture[1])]
    lead = outcome.sentence(model, source)
    return Section(TITLE, lead=lead, tables=[_table(outcome)], plots=plots, notes=_notes(outcome))


def _table(outcome: Outcome) -> Table:
    """Columns of which something is known; what is not known of a row is said so. Of the source itself nothing was lost."""
    written, read = [stage.cache for stage in outcome.stages], [_read(stage.cache) for stage in outcome.stages]
    columns = {
        f"KV cache a token{' written' if any(read) else ''}": [_cache(cache) for cache in written],
        "KV cache a position read": read,
        f"KV cache at {outcome.context or 0:,} tokens": [_context(stage.cache, outcome.context) for stage in outcome.stages],
        "loss, nats a token": [None if stage.loss is None else half_width(stage.loss, DIGITS) for stage in outcome.stages],
        "above the source": [None if stage.lost is None else stage.lost.cell() for stage in outcome.stages],
        "word error rate": [None if stage.wrong is None else f"{points(stage.wrong.rate)} %" for stage in outcome.stages],
        "points more": [
            None if not stage.wrong or not stage.wrong.more else points(stage.wrong.more) for stage in outcome.stages
        ],
        "agreement with the source": [None if stage.agreement is None else stage.agreement.cell for stage in outcome.stages],
    }
    known = {name: cells for name, cells in columns.items() if any(cells)}
    of_others = ("above the source", "points more", "agreement with the source")
    rows = [
        [
            f"{stage.label}: {stage.name}" if stage.name else stage.label,
            *(cells[index] or ("–" if name in of_others and not index else UNKNOWN) for name, cells in known.items()),
        ]
        for index, stage in enumerate(outcome.stages)
    ]
    return Table("", ["model", *known], rows)


def _cache(cache: Cache | None) -> str | None:
    return None if cache is None else human_bytes(cache.per_token)


def _read(cache: Cache | None) -> str | None:
    return None if cache is None or cache.per_position is None else human_bytes(cache.per_position)


def _context(cache: Cache | None, tokens: int | None) -> str | None:
    size = None if cache is None or cache.per_position is not None or tokens is None else cache.at(tokens)
    return None if size is None else human_bytes(size)


def _notes(outcome: Outcome) -> list[str]:
    """What the figures are of, and what is missing."""
    types = {name for stage in outcome.stages if stage.cache for name in stage.cache.types}
    caches = (
        f"Caches were measured, in {' and '.join(sorted(types))}."
        if types
        else "Caches are those that the weights' shapes make."
    )
    if outcome.data is None:
        last, source = outcome.last.name, outcome.stages[0].name
        return [f"{caches} Loss was not measured; this does it: upfit evaluate {last} --against {source} --data TEXT --record"]
    beside = f" {wording.GIVEN}" if "examples" in outcome.data else ""
    notes = [f"{wording.LOSS}{beside} It is of {where(outcome.data)}; ± is half of a 95 % interval. {caches}"]
    return notes + list(dict.fromkeys(stage.agreement.note for stage in outcome.stages if stage.agreement))


def _picture(outcome: Outcome) -> tuple[str, Figure] | None:
    """Caption and figure: bars of the cache above, what was lost with intervals below; None where nothing can be compared."""
    caches = [(stage, stage.cache.per_token) for stage in outcome.stages if stage.cache is not None]
    read = [(stage, stage.cache.per_position) for stage, _ in caches if stage.cache and stage.cache.per_position is not None]
    lost = [stage for stage in outcome.stages[1:] if stage.lost is not None and stage.lost.unit == "nats a token"]
    if len(caches) < 2:
        return None
    names = [stage.label for stage in outcome.stages]
    counts = [len(caches), *([len(read)] if read else []), *([len(lost) + 1] if lost else [])]
    heights = [0.62 + 0.34 * count for count in counts]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.12)
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flatten().tolist()
    _bars(grid[0], caches, names, "a token written" if read else "a token")
    if read:
        _bars(grid[1], read, names, "a position read")
    if not lost:
        return wording.BARS, figure
    _losses(grid[-1], outcome.stages[0], lost, names)
    return wording.ABOVE_AND_BELOW, figure


def _bars(axes: Any, caches: list[tuple[Stage, float]], names: list[str], of: str) -> None:
    rows = np.arange(len(caches))[::-1]
    colours = [series(stage.label, names)["color"] for stage, _ in caches]
    bars = axes.barh(rows, [size for _, size in caches], color=colours, height=0.62)
    axes.bar_label(bars, [human_bytes(size) for _, size in caches], padding=4)
    axes.set_title(f"saved: KV cache {of}", loc="left", fontsize=10, fontweight="bold")
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    _dress(axes, rows, [stage.label for stage, _ in caches])


def _losses(axes: Any, source: Stage, lost: list[Stage], names: list[str]) -> None:
    rows = np.arange(len(lost) + 1)[::-1]
    axes.axvline(0, color="black", linewidth=1)
    axes.plot([0], rows[:1], color=series(source.label, names)["color"], marker="o")
    for row, stage in zip(rows[1:], lost, strict=True):
        assert stage.lost is not None
        estimate = stage.lost.estimate
        ends = (
            None if estimate["low"] is None else [[estimate["mean"] - estimate["low"]], [estimate["high"] - estimate["mean"]]]
        )
        colour = series(stage.label, names)["color"]
        axes.errorbar([estimate["mean"]], [row], xerr=ends, fmt="o", capsize=4, color=colour)
    axes.set_title("lost: nats a token above the source", loc="left", fontsize=10, fontweight="bold")
    axes.margins(x=0.08)
    _dress(axes, rows, [source.label, *(stage.label for stage in lost)])


def _dress(axes: Any, rows: np.ndarray, labels: list[str]) -> None:
    axes.set_yticks(rows, labels)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.spines[["top", "right"]].set_visible(False)
