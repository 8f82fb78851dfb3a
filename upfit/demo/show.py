"""The demo's table and plot."""

from pathlib import Path
from typing import Any

from upfit.output import Output


def show(result: dict[str, Any], output: Output) -> None:
    """Print the table and save the plot of what `run_demo` returned."""
    source = result["source"]
    rows = [["source", f"{source['kv_bytes_per_token']:.0f}", _loss(source), ""]]
    for row in result["conversions"]:
        for stage in ("converted", "uptrained"):
            numbers = row[stage]
            rows.append(
                [f"{row['name']} {stage}", f"{numbers['kv_bytes_per_token']:.0f}", _loss(numbers), _difference(numbers)]
            )
    title = "KV bytes and loss (nats) a token, held-out standard library, 95 % intervals, differences paired"
    output.table(["model", "KV bytes", "loss", "against source"], rows, title)
    plot(result, Path(result["plot"]))
    output.line(f"{result['seconds']:.0f} s. Plot: {result['plot']}")


def _loss(numbers: dict[str, Any]) -> str:
    loss = numbers["loss"]
    return f"{loss['mean']:.3f} ± {loss['mean'] - loss['low']:.3f}"


def _difference(numbers: dict[str, Any]) -> str:
    difference = numbers["difference"]
    return f"{difference['mean']:+.3f} ± {difference['mean'] - difference['low']:.3f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: loss of source, converted, uptrained. Right: training loss over tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    stages, curves = figure.subplots(1, 2)
    names = [row["name"] for row in result["conversions"]]
    source = result["source"]["loss"]["mean"]
    for index, row in enumerate(result["conversions"]):
        before, after = row["converted"]["loss"], row["uptrained"]["loss"]
        errors = [
            [numbers["mean"] - numbers["low"] for numbers in (before, after)],
            [numbers["high"] - numbers["mean"] for numbers in (before, after)],
        ]
        stages.errorbar([index, index], [before["mean"], after["mean"]], yerr=errors, fmt="none", ecolor="0.6", capsize=3)
        stages.annotate("", (index, after["mean"]), (index, before["mean"]), arrowprops={"arrowstyle": "->", "color": "0.4"})
        stages.plot(index, before["mean"], "o", color="tab:red", label="converted" if not index else None)
        stages.plot(index, after["mean"], "o", color="tab:green", label="uptrained" if not index else None)
        curves.plot(*zip(*row["curve"], strict=True), label=row["name"], linewidth=1)
    for axes in (stages, curves):
        axes.axhline(source, color="black", linestyle="--", linewidth=1, label="source, held out")
        axes.set_ylabel("loss, nats a token")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    stages.set_xticks(range(len(names)), names, fontsize=8)
    stages.set_title("Held-out files")
    curves.set_xlabel("tokens of uptraining")
    curves.set_title("Cross-entropy while training")
    figure.savefig(path, dpi=120)
