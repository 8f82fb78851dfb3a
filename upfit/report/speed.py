"""Tables and plots of how fast the models read and write, and how large their caches are."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from upfit.output import human_bytes
from upfit.report.figures import WIDTH, panels, series
from upfit.report.page import Plot, Table
from upfit.report.subjects import Evaluation, Text, key_of

PHASES = ("prefill", "decode")


def tables(text: Text) -> list[Table]:
    """One table for each machine and way of timing; a source that was timed beside several models stands beside each."""
    found: dict[str, list[list[str]]] = {}
    for label, told in text.evaluations:
        for row in (told["speed"] or {"rows": []})["rows"]:
            for key in ("model", "against"):
                if key in row:
                    name = label if key == "model" else f"source, beside {label}"
                    found.setdefault(_machine(told), []).append(_row(name, row, key))
    columns = ["", "prefill tokens/s", "decode tokens/s", "decode, times the source", "cache"]
    return [Table(f"Speed on {where}", columns, rows) for where, rows in found.items()]


def _row(name: str, row: dict[str, Any], key: str) -> list[str]:
    rates = [f"{row[key][f'{phase}_tokens_per_s']['median']:,.0f}" for phase in PHASES]
    ratio = f"{row['ratio']['decode']['median']:.2f}" if key == "model" and "ratio" in row else ""
    return [f"{name}, {row['context']} tokens", *rates, ratio, human_bytes(row[key]["cache_bytes"])]


def _machine(told: dict[str, Any]) -> str:
    where = ", ".join(str(value) for value in told["hardware"].values() if isinstance(value, str))
    batch = told["speed"].get("batch")
    return where if batch in (None, 1) else f"{where}, {batch} sequences at once"


def plots(text: Text, number: int) -> list[Plot]:
    """Timings by context, where there are any, and cache bytes, where they differ."""
    found = []
    timed = [(label, told) for label, told in text.evaluations if told["speed"]]
    if timed:
        caption = "Tokens a second by length of context: median, lowest and highest; the ratio is of neighbouring timings"
        found.append(Plot(f"speed-{number}", caption, _speeds(timed, text)))
    caches = [
        (model.label, model.subject["cache"]["bytes_per_token"]) for model in text.models if model.subject["cache"] is not None
    ]
    if len({size for _, size in caches}) > 1:
        found.append(Plot(f"cache-{number}", "KV cache, bytes a token, measured", _caches(caches, text.labels)))
    return found


def _speeds(timed: list[Evaluation], text: Text) -> Figure:
    """Rates of both phases; beside them, where a source was timed too, the ratios to it."""
    ratios = any("ratio" in row for _, told in timed for row in told["speed"]["rows"])
    figure, found = panels(4 if ratios else 2)
    for axes, phase in zip(found, PHASES, strict=False):
        drawn: set[str] = set()
        for label, told in timed:
            lines = {"model": label}
            if told["against"] is not None:
                lines["against"] = next(
                    (m.label for m in text.models if key_of(m.subject) == key_of(told["against"])), "source"
                )
            for key, name in lines.items():
                if name not in drawn:  # of a source that was timed several times the first
                    drawn.add(name)
                    spreads = [row[key][f"{phase}_tokens_per_s"] for row in told["speed"]["rows"]]
                    _line(axes, told, spreads, name, text.labels)
        axes.set_ylabel(f"{phase}, tokens/s")
        axes.yaxis.set_major_formatter(EngFormatter())
    for axes, phase in zip(found[2:], PHASES, strict=False):
        for label, told in timed:
            if all("ratio" in row for row in told["speed"]["rows"]):
                _line(axes, told, [row["ratio"][phase] for row in told["speed"]["rows"]], label, text.labels)
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set_ylabel(f"{phase}, times the source")
    for axes in found:
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context, tokens")
    lines, names = found[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _line(axes: Any, told: dict[str, Any], spreads: list[dict[str, float]], label: str, labels: list[str]) -> None:
    middles = [one["median"] for one in spreads]
    ends = [[abs(one["median"] - one[end]) for one in spreads] for end in ("low", "high")]
    contexts = [row["context"] for row in told["speed"]["rows"]]
    axes.errorbar(contexts, middles, yerr=ends, capsize=3, label=label, **series(label, labels))


def _caches(caches: list[tuple[str, float]], labels: list[str]) -> Figure:
    figure, [axes] = panels(1)
    figure.set_size_inches(2 * WIDTH, 0.9 + 0.36 * len(caches))
    rows = np.arange(len(caches))[::-1]
    bars = axes.barh(rows, [size for _, size in caches], color=[series(label, labels)["color"] for label, _ in caches])
    axes.bar_label(bars, [human_bytes(size) for _, size in caches], padding=3, fontsize=8)
    axes.set_yticks(rows, [label for label, _ in caches])
    axes.margins(x=0.12)
    axes.set_xlabel("bytes a token")
    axes.xaxis.set_major_formatter(EngFormatter())
    return figure
