"""Plots from plain data. Every function returns a matplotlib figure; nothing here reads or writes files."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

WIDTH, HEIGHT = 4.8, 3.1  # inches of one panel
ONE_COLUMN = 6.0  # inches of a figure of bars or dots; its text can still be read on a telephone
STEPS = {
    "attention_error": "error of attention outputs",
    "ce": "cross-entropy to the text, nats a token",
    "kl": "divergence from the teacher, nats a token",
    "recovery": "share of the divergence that is closed",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}
LOGARITHMIC = ("attention_error", "ce", "kl", "grad_norm")
COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: all eyes tell them apart
MARKERS = "osD^vPX*"


def panels(count: int, columns: int = 2) -> tuple[Figure, list[Any]]:
    """`count` panels, `columns` a row."""
    rows, across = -(-count // columns), min(count, columns)
    figure = Figure(figsize=(WIDTH * across, HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False).flatten().tolist()
    for extra in axes[count:]:
        figure.delaxes(extra)
    for panel in axes[:count]:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def series(label: str, labels: list[str]) -> dict[str, Any]:
    """How the line of one of the models `labels` looks, the same in every plot of a page; told apart without colours too."""
    index = labels.index(label) if label in labels else len(labels)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "linewidth": 1.2}


def logarithmic(axes: Any) -> None:
    """A logarithmic axis with plain numbers: matplotlib's own are formulas, which a page does not set."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())


def losses(models: list[tuple[str, dict[str, Any]]], what: str) -> Figure:
    """One dot with its interval for each [label, {mean, low, high}] (None without an interval); `what` the axis says."""
    labels, estimates = [label for label, _ in models], [estimate for _, estimate in models]
    figure, [axes] = panels(1)
    figure.set_size_inches(ONE_COLUMN, 0.9 + 0.36 * len(labels))
    means = [estimate["mean"] for estimate in estimates]
    ends = [[0 if e["low"] is None else abs(e["mean"] - e[end]) for e in estimates] for end in ("low", "high")]
    rows = np.arange(len(labels))[::-1]
    axes.errorbar(means, rows, xerr=ends, fmt="o", capsize=3)
    axes.set_yticks(rows, labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlabel(what)
    return figure


def positions(labels: list[str], parts: list[list[float]], length: int, written: bool = False) -> Figure:
    """Loss by position: `parts` holds for each model the loss of equal parts of a window of `length` tokens; with `written`, of
    what a decoder writes for each example, however long that is."""
    figure, [axes] = panels(1)
    for label, values in zip(labels, parts, strict=True):
        middles = (np.arange(len(values)) + 0.5) * (1 if written else length) / len(values)
        axes.plot(middles, values, label=label, **series(label, labels))
    axes.set_xlabel("position in what is written, as a share of it" if written else "position in the window")
    axes.set_ylabel("nats a token")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def training(lines: list[dict[str, Any]], teacher: float | None, apart: float | None) -> Figure | None:
    """Losses, what of them is won back, learning rate, gradient norm and speed over tokens, of the lines of metrics.jsonl.

    `teacher` is its loss and `apart` the divergence from it before the first step, both in nats a token on held-out rows.
    None when the lines say nothing of these.
    """
    if apart:
        lines = [line | {"recovery": 1 - line["kl"] / apart} if isinstance(line.get("kl"), float) else line for line in lines]
    curves = {key: points for key in STEPS if _says_something(points := _points(lines, key))}
    if not curves:
        return None
    figure, drawn = panels(len(curves))
    for axes, (key, points) in zip(drawn, curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), linewidth=1)
        for source, measured in _held_out(lines, key).items():
            label = f"held-out rows of {source}" if source else "held-out rows"
            axes.plot(*zip(*measured, strict=True), "o-" if source else "ko-", linewidth=1, markersize=3, label=label)
            axes.legend(fontsize=8)
        axes.set_title(STEPS[key], fontsize=9)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if key == "ce" and teacher is not None:
            axes.axhline(teacher, color="black", linestyle="--", linewidth=1, label="teacher, held-out rows")
            axes.legend(fontsize=8)
        elif key == "recovery":
            axes.set_ylim(min(0.0, min(value for _, value in points)), 1)
        elif key not in LOGARITHMIC:
            axes.set_ylim(bottom=0)
        elif all(value > 0 for _, value in points):
            logarithmic(axes)
    return figure


def _says_something(points: list[tuple[float, float]]) -> bool:
    return any(value for _, value in points)


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["tokens"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _held_out(lines: list[dict[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """What was measured on the way, as [tokens, value]: of all held-out rows ("") and of each of several sources."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("holdout_"))
    sources = {"": f"holdout_{key}"} | {
        name.removeprefix("holdout_").removesuffix(f"/{key}"): name for name in names if name.endswith(f"/{key}")
    }
    return {source: points for source, name in sources.items() if (points := _points(lines, name))}


def watched(lines: list[dict[str, Any]]) -> Figure | None:
    """What the attention modules said while training, layer by layer over tokens; None when they said nothing."""
    names = sorted({key for line in lines for key, value in line.items() if isinstance(value, list)})
    if not names:
        return None
    figure, drawn = panels(len(names))
    for axes, name in zip(drawn, names, strict=True):
        measured = [(line["tokens"], line[name]) for line in lines if name in line]
        values = np.array([row for _, row in measured], dtype=float).T
        shown = axes.pcolormesh(np.array([at for at, _ in measured]), np.arange(len(values)), values, shading="nearest")
        figure.colorbar(shown, ax=axes, label={"position_content": "position/content"}.get(name, name.replace("_", " ")))
        axes.set_xlabel("tokens")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def layers(rows: list[dict[str, Any]]) -> Figure | None:
    """What a conversion measured of each layer: errors together, each other figure by itself; dots where there is one a head.

    None when it measured nothing.
    """
    keys = sorted({key for row in rows for key in row if _varies(rows, key)})
    errors, others = [key for key in keys if key.endswith("_error")], [key for key in keys if not key.endswith("_error")]
    groups = ([errors] if errors else []) + [[key] for key in others]
    if not groups:
        return None
    figure, drawn = panels(len(groups))
    for axes, group in zip(drawn, groups, strict=True):
        for key in group:
            points = [(index, value) for index, row in enumerate(rows) for value in _numbers(row.get(key))]
            style = "o-" if len(points) == len({index for index, _ in points}) else "o"
            axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=key.replace("_", " "))
        if group is errors and all(value > 0 for key in group for row in rows for value in _numbers(row.get(key))):
            logarithmic(axes)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)
    return figure


def _varies(rows: list[dict[str, Any]], key: str) -> bool:
    return len({value for row in rows for value in _numbers(row.get(key))}) > 1


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(number, int | float) and not isinstance(number, bool) for number in values) else []


def sensitivity(prediction: dict[str, Any]) -> Figure:
    """Predicted errors of attention and output, layers by numbers of key/value heads, beside the cache each number leaves."""
    counts = [count for count in prediction["kv_heads"] if count < max(prediction["kv_heads"])] or prediction["kv_heads"]
    figure = Figure(figsize=(2 * WIDTH, max(HEIGHT, 0.16 * len(prediction["layers"]) + 1.2)), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    for axes, name in zip(panels, ("attention_error", "output_error"), strict=False):
        cells = [{c["kv_heads"]: c[name] for c in layer["choices"]} for layer in prediction["layers"]]
        values = np.array([[_or_nan(row.get(count)) for count in counts] for row in cells], dtype=float)
        shown = axes.imshow(values, aspect="auto", vmin=0, cmap="viridis")
        figure.colorbar(shown, ax=axes)
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlabel("key/value heads")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(name.replace("_", " ") + ", share lost", fontsize=9)
    panels[0].set_ylabel("layer")
    totals = {row["kv_heads"]: row for row in prediction["totals"]}
    for name in ("attention_error", "output_error"):
        points = [
            (totals[c]["kv_bytes_per_token"], totals[c][name]) for c in prediction["kv_heads"] if totals[c][name] is not None
        ]
        if points:
            panels[2].plot(*zip(*points, strict=True), "o-", markersize=4, label=name.replace("_", " "))
    panels[2].set_xlabel("KV cache, bytes a token")
    panels[2].set_title("mean of the layers", fontsize=9)
    panels[2].xaxis.set_major_formatter(EngFormatter())
    panels[2].set_ylim(bottom=0)
    panels[2].grid(alpha=0.3)
    if panels[2].lines:
        panels[2].legend(fontsize=8)
    return figure


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
