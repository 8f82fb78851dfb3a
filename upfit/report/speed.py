"""Tables and plots of how fast the models read and write, and how large their caches are."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from upfit.output import human_bytes
from upfit.report import wording
from upfit.report.figures import ONE_COLUMN, panels, series
from upfit.report.page import Plot, Table
from upfit.report.subjects import Evaluation, Text, key_of

PHASES = ("prefill", "decode")


def tables(text: Text) -> list[Table]:
    """One table for each machine and way of timing; a source that was timed beside several models stands beside each."""
    by_machine: dict[str, list[list[str]]] = {}
    for label, answer in text.evaluations:
        for row in (answer["speed"] or {"rows": []})["rows"]:
            for key in ("model", "against"):
                if key in row:
                    name = label if key == "model" else f"source, beside {label}"
                    by_machine.setdefault(_machine(answer), []).append(_row(name, row, key))
    columns = ["", "prefill tokens/s", "decode tokens/s", "decode, times the source", "cache"]
    return [Table(f"Speed on {where}", columns, rows) for where, rows in by_machine.items()]


def _row(name: str, row: dict[str, Any], key: str) -> list[str]:
    rates = [f"{row[key][f'{phase}_tokens_per_s']['median']:,.0f}" for phase in PHASES]
    ratio = f"{row['ratio']['decode']['median']:.2f}" if key == "model" and "ratio" in row else ""
    return [f"{name}, {row['context']} tokens", *rates, ratio, human_bytes(row[key]["cache_bytes"])]


def _machine(answer: dict[str, Any]) -> str:
    where = ", ".join(str(value) for value in answer["hardware"].values() if isinstance(value, str))
    batch = answer["speed"].get("batch")
    return where if batch in (None, 1) else f"{where}, {batch} sequences at once"


def plots(text: Text, number: int) -> list[Plot]:
    """Timings by context, where there are any, and cache bytes, where they differ."""
    plots = []
    timed = [(label, answer) for label, answer in text.evaluations if answer["speed"]]
    if timed:
        plots.append(Plot(f"speed-{number}", wording.SPEED, _speeds(timed, text)))
    caches = [
        (model.label, model.subject["cache"]["bytes_per_token"]) for model in text.models if model.subject["cache"] is not None
    ]
    if len({size for _, size in caches}) > 1:
        plots.append(
            Plot(
                f"cache-{number}",
                wording.CACHES,
                _caches(caches, text.labels),
            )
        )
    return plots


def _speeds(timed: list[Evaluation], text: Text) -> Figure:
    """Rates of both phases; beside them, where a source was timed too, the ratios to it."""
    ratios = any("ratio" in row for _, answer in timed for row in answer["speed"]["rows"])
    figure, grid = panels(4 if ratios else 2)
    for axes, phase in zip(grid, PHASES, strict=False):
        drawn: set[str] = set()
        for label, answer in timed:
            lines = {"model": label}
            if answer["against"] is not None:
                lines["against"] = next(
                    (m.label for m in text.models if key_of(m.subject) == key_of(answer["against"])), "source"
                )
            for key, name in lines.items():
                if name not in drawn:  # of a source that was timed several times the first
                    drawn.add(name)
                    spreads = [row[key][f"{phase}_tokens_per_s"] for row in answer["speed"]["rows"]]
                    _line(axes, answer, spreads, name, text.labels)
        axes.set_ylabel(f"{phase}, tokens/s")
        axes.yaxis.set_major_formatter(EngFormatter())
    for axes, phase in zip(grid[2:], PHASES, strict=False):
        for label, answer in timed:
            if all("ratio" in row for row in answer["speed"]["rows"]):
                _line(axes, answer, [row["ratio"][phase] for row in answer["speed"]["rows"]], label, text.labels)
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set_ylabel(f"{phase}, times the source")
    for axes in grid:
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context, tokens")
    lines, names = grid[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _line(axes: Any, answer: dict[str, Any], spreads: list[dict[str, float]], label: str, labels: list[str]) -> None:
    middles = [spread["median"] for spread in spreads]
    ends = [[abs(spread["median"] - spread[end]) for spread in spreads] for end in ("low", "high")]
    contexts = [row["context"] for row in answer["speed"]["rows"]]
    axes.errorbar(contexts, middles, yerr=ends, capsize=3, label=label, **series(label, labels))


def _caches(caches: list[tuple[str, float]], labels: list[str]) -> Figure:
    figure, [axes] = panels(1)
    figure.set_size_inches(ONE_COLUMN, 0.9 + 0.36 * len(caches))
    rows = np.arange(len(caches))[::-1]
    bars = axes.barh(rows, [size for _, size in caches], color=[series(label, labels)["color"] for label, _ in caches])
    axes.bar_label(bars, [human_bytes(size) for _, size in caches], padding=3, fontsize=8)
    axes.set_yticks(rows, [label for label, _ in caches])
    axes.margins(x=0.12)
    axes.set_xlabel("bytes a token")
    axes.xaxis.set_major_formatter(EngFormatter())
    return figure
