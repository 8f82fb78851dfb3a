"""Plots of what the heads attend to: each head's share on a needle's answer, and the whole attention maps of a few heads.

Reads `attention_by_head` and `maps` of the needle probe of `upfit evaluate`.
"""

from typing import Any

import numpy as np
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from upfit.report import wording
from upfit.report.page import Plot, Section
from upfit.report.subjects import Measured

Needles = list[tuple[str, dict[str, Any]]]  # label of a model, its needle probe
ACROSS = 3
PANEL = 3.1  # inches
TEXT = "In the maps below, models read: “{}” The dashed lines stand at the answer in the needle and at the position that asks."


def sections(models: list[Measured], number: int) -> list[Section]:
    """A section where a model tells of its heads; else none."""
    needles = [(model.label, (model.subject.get("probes") or {}).get("needle") or {}) for model in models]
    shares = [(label, probe["attention_by_head"]) for label, probe in needles if probe.get("attention_by_head")]
    maps_of = [(label, probe["maps"]) for label, probe in needles if (probe.get("maps") or {}).get("heads")]
    plots, texts = [], list[str]()
    if shares:
        plots.append(Plot(f"heads-{number}", wording.HEADS, _heads(shares)))
    if maps_of:
        texts.append(TEXT.format("".join(maps_of[0][1]["tokens"]).strip()))
        caption = wording.MAPS.format(signed=", below 0 where heads are subtracted" if _signed(maps_of) else "")
        plots.append(Plot(f"maps-{number}", caption, _maps(maps_of)))
    return [Section("Attention", texts, plots=plots)] if plots else []


def _norm(low: float, high: float) -> FuncNorm:
    """Colours by the square root, sign kept: most weights are small."""
    return FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2), low, high)


def _heads(models: list[tuple[str, list[list[float]]]]) -> Figure:
    """Layers by heads, a panel for each model; where layers have different numbers of heads the rest is grey."""
    high = max(max(layer) for _, layers in models for layer in layers) or 1.0
    down, across = -(-len(models) // ACROSS), min(len(models), ACROSS)
    deepest = max(len(layers) for _, layers in models)
    size = (max(5.0, PANEL * across), (1.1 + min(4.0, 0.2 * deepest + 0.6)) * down)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten().tolist()
    norm = _norm(0.0, high)
    for axes, (label, layers) in zip(panels, models, strict=False):
        grid = np.full((len(layers), max(map(len, layers))), np.nan)
        for index, layer in enumerate(layers):
            grid[index, : len(layer)] = layer
        axes.set_facecolor("#cccccc")
        drawn = axes.pcolormesh(grid, norm=norm, cmap="viridis")
        axes.set_xlim(0, grid.shape[1])
        axes.set_ylim(len(layers), 0)
        _count(axes.xaxis, grid.shape[1])
        _count(axes.yaxis, len(layers))
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("head, by the source's numbers")
        axes.set_ylabel("layer")
    for axes in panels[len(models) :]:
        figure.delaxes(axes)
    figure.colorbar(drawn, ax=panels[: len(models)], label="share on the answer", ticks=_ticks(0.0, high))
    return figure


def _count(axis: Any, count: int) -> None:
    """Numbers from 0 in the middle of the cells, about eight of them."""
    step = max(1, -(-count // 8))
    axis.set_ticks(np.arange(0, count, step) + 0.5, [str(tick) for tick in range(0, count, step)])


def _ticks(low: float, high: float) -> list[float]:
    return [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def _signed(maps_of: Needles) -> bool:
    return any(weight < 0 for _, maps in maps_of for head in maps["heads"] for row in head["weights"] for weight in row)


def _square(weights: list[list[float]]) -> np.ndarray:
    """[T, T] of rows that end at the diagonal, each a share of its absolute sum; NaN beyond it."""
    square = np.full((len(weights), len(weights)), np.nan)
    for index, row in enumerate(weights):
        square[index, : index + 1] = np.array(row) / (np.abs(row).sum() or 1.0)
    return square


def _maps(maps_of: Needles) -> Figure:
    """A row for each (layer, head), a column for each model."""
    heads = list(dict.fromkeys((shown["layer"], shown["head"]) for _, maps in maps_of for shown in maps["heads"]))
    squares = {
        (label, shown["layer"], shown["head"]): _square(shown["weights"]) for label, maps in maps_of for shown in maps["heads"]
    }
    signed = _signed(maps_of)
    norm, colours = _norm(-1.0 if signed else 0.0, 1.0), "PuOr" if signed else "viridis"
    figure = Figure(figsize=(max(5.0, PANEL * len(maps_of) + 0.8), PANEL * len(heads)), layout="constrained")
    grid = figure.subplots(len(heads), len(maps_of), squeeze=False)
    for row, head in enumerate(heads):
        for column, (label, maps) in enumerate(maps_of):
            axes = grid[row][column]
            own = next((shown.get("own_head") for shown in maps["heads"] if (shown["layer"], shown["head"]) == head), None)
            moved = "" if own in (None, head[1]) else f" (here {own})"
            axes.set_title(f"{label}\nlayer {head[0]}, head {head[1]}{moved}", fontsize=9)
            if (label, *head) not in squares:
                axes.text(0.5, 0.5, "not kept", ha="center", va="center", transform=axes.transAxes)
                axes.set_xticks([])
                axes.set_yticks([])
                continue
            drawn = axes.imshow(squares[label, *head], norm=norm, cmap=colours, interpolation="nearest")
            _mark(axes, maps)
    figure.colorbar(
        drawn, ax=grid.ravel().tolist(), label="share of the attention", shrink=0.6, ticks=_ticks(norm.vmin or 0, 1)
    )
    return figure


def _mark(axes: Any, maps: dict[str, Any]) -> None:
    first, last = maps["needle"]
    colour = {"color": "#D55E00", "linestyle": "--", "linewidth": 0.8}
    for edge in (first - 0.5, last - 0.5):
        axes.axvline(edge, **colour)
    axes.axhline(maps["asks"], **colour)
    axes.set_xticks([0, (first + last - 1) / 2], ["first token", "answer"], fontsize=7)
    axes.set_yticks([0, maps["asks"]], ["first", "asks"], fontsize=7)
