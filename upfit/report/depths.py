"""Figures of scores by depth and length of a text. Plain data in, matplotlib figures out."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from upfit.report.figures import WIDTH, panels, series

ACROSS = 3  # heat maps beside each other
CELLS_WITH_NUMBERS = 10  # depths up to which a cell has room for its number
Rows = dict[str, dict[str, Any]]  # by length


def curves(
    lines: list[tuple[str, list[float], list[float]]], labels: list[str], what: str, where: str, whole: bool = False
) -> Figure:
    """One panel of [model, depths, values]; with `whole` the values are shares and the axis goes from 0 to 1."""
    figure, [axes] = panels(1)
    for label, at, values in lines:
        axes.plot(at, values, label=label, **series(label, labels))
    _dress(axes, what, where, whole)
    return figure


def by_length(models: list[tuple[str, Rows]], lengths: list[str], kind: str, what: str, labels: list[str]) -> Figure:
    """For each length a panel with a line for each model, its interval where it is told, and the floor of scores."""
    figure, places = panels(len(lengths))
    for axes, length in zip(places, lengths, strict=True):
        floors = set()
        for label, rows in models:
            if length not in rows:
                continue
            row, style = rows[length], series(label, labels)
            axes.plot(row["depths"], row[kind], label=label, **style)
            ends = [(interval["low"], interval["high"]) for interval in row.get("intervals", ())]
            if ends and all(low is not None for low, _ in ends):
                axes.fill_between(row["depths"], *zip(*ends, strict=True), color=style["color"], alpha=0.12, linewidth=0)
            floors |= {row["floor"]} if kind == "scores" and "floor" in row else set()
        for floor in floors:
            axes.axhline(floor, color="black", linestyle=":", linewidth=1)
        axes.set_title(f"{int(length):,} tokens" + (" (dotted: floor)" if floors else ""), fontsize=9)
        _dress(axes, what, "depth, 0 is the beginning", kind == "scores")
    return figure


def _dress(axes: Any, what: str, where: str, whole: bool) -> None:
    axes.set_xlim(-0.02, 1.02)
    if whole:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(where)
    axes.set_ylabel(what)
    if axes.lines:
        axes.legend(fontsize=8)


def heat_maps(models: list[tuple[str, Rows]], lengths: list[str], kind: str, what: str) -> Figure:
    """Lengths by depths, a panel for each model, one colour scale: 0 to 1 of scores, the range there is of nats (reversed, so
    that bright is good). A length that a model was not given is grey."""
    values = np.concatenate([row[kind] for _, rows in models for row in rows.values()])
    low, high = (0.0, 1.0) if kind == "scores" else (float(np.min(values)), float(np.max(values)))
    scale = {"vmin": low, "vmax": high, "cmap": "viridis" if kind == "scores" else "viridis_r"}
    down, across = -(-len(models) // ACROSS), min(len(models), ACROSS)
    figure = Figure(figsize=(max(WIDTH, 3.3 * across), (1.3 + 0.42 * len(lengths)) * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for axes, (label, rows) in zip(grid, models, strict=False):
        axes.set_facecolor("#cccccc")
        for place, length in enumerate(lengths):
            if length in rows:
                drawn = axes.pcolormesh(
                    _edges(rows[length]["depths"]), [place - 0.5, place + 0.5], [rows[length][kind]], **scale
                )
                _write(axes, place, rows[length]["depths"], rows[length][kind], drawn)
        axes.set_title(label, fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(lengths) - 0.5, -0.5)
        axes.set_yticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
        axes.set_xlabel("depth, 0 is the beginning", fontsize=9)
    for axes in grid[len(models) :]:
        figure.delaxes(axes)
    for axes in grid[: len(models) : across]:
        axes.set_ylabel("tokens")
    figure.colorbar(drawn, ax=grid[: len(models)], label=what)
    return figure


def _edges(depths: list[float]) -> list[float]:
    """Where the cells of these depths begin and end: half way to the neighbours, and at the ends of the text."""
    return [0.0, *((depth + other) / 2 for depth, other in zip(depths, depths[1:], strict=False)), 1.0]


def _write(axes: Any, place: int, depths: list[float], values: list[float], drawn: Any) -> None:
    """The number into each cell, in white or black, whatever the cell's colour lets one read."""
    if len(depths) > CELLS_WITH_NUMBERS:
        return
    edges = _edges(depths)
    for index, value in enumerate(values):
        red, green, blue, _ = drawn.cmap(drawn.norm(value))
        colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        middle = (edges[index] + edges[index + 1]) / 2
        axes.text(middle, place, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
