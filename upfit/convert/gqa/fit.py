"""`--method aligned`: from calibration text (or kept statistics) to a plan whose rules take tensors that were fitted
beforehand."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from upfit.checkpoint.content import file_hash
from upfit.checkpoint.plan import Plan
from upfit.convert.fitting import Calibration, Task, fit_layers, read_calibration
from upfit.convert.gqa.choice import Choice, statistics_for
from upfit.convert.gqa.convert_layers import begin
from upfit.convert.gqa.grouping import head_order
from upfit.convert.gqa.layer_state import Settings
from upfit.convert.gqa.pooling import pool_heads
from upfit.provenance import FITTED, HEAD_ORDER, METHOD_RAN, STATE

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer
    from upfit.convert.recipe import FitContext


def fit(context: "FitContext", choice: Choice, plan: Plan) -> Plan:
    """Fit every layer and give `plan` rules that read the results, which stand in the folder of the fit.

    Raises UpfitError for calibration text that cannot be used, Opaque for a model that cannot be run on text.
    """
    statistics = statistics_for(context, choice)
    if statistics is None:
        calibration = read_calibration(context, choice.calibration, choice.tokens, choice.length)
    else:
        calibration = Calibration(statistics.sample, statistics.model)
    settings = Settings(choice.kv_heads, choice.refit)
    task = Task(
        title="aligning",
        label=f"→ {choice.kv_heads} key/value heads, aligned" + (", refitted" if choice.refit else ""),
        settings={
            "recipe": "gqa",
            "config": plan.config,
            "statistics": file_hash(statistics.path) if statistics else None,
            **asdict(settings),
        },
        layers=[layer for layer in context.architecture.layers if layer.geometry.kv_heads > choice.kv_heads],
        begin=lambda walk: begin(walk, plan.config, statistics.layer if statistics else lambda path: None, settings),
        note=_progress,
    )
    fitted = fit_layers(context, calibration, task)
    report: dict[str, Any] = {
        METHOD_RAN: "aligned",
        STATE: FITTED,
        "calibration": calibration.record(),
        "layers": fitted.records,
    }
    report[HEAD_ORDER] = _head_order(context.architecture.layers, fitted.records)
    notes = (*plan.notes, *_notes(fitted.records))
    return Plan(plan.config, tuple(fitted.rules), notes=notes, report=report)


def _head_order(layers: "tuple[Layer, ...]", records: list[dict[str, Any]]) -> list[list[int]]:
    """Of every layer of the model; where heads were not merged, or could not be watched, they stand as they did."""
    groups, orders = {record["layer"]: record["groups"] for record in records}, []
    for layer in layers:
        alone = [[head] for head in range(layer.geometry.kv_heads)]
        share = layer.geometry.heads // layer.geometry.kv_heads
        orders.append(head_order(groups.get(layer.path) or alone, share))
    return orders


def _progress(record: dict[str, Any]) -> str:
    error = record["fitted_error"] if record["fitted_error"] is not None else record["merged_error"]
    return record["layer"] + (f" score error {error:.3f}" if error is not None else "")


def _notes(records: list[dict[str, Any]]) -> list[str]:
    """What was left out, each reason once with the number of layers it holds for."""
    counts: dict[str, int] = {}
    for record in records:
        for reason in record["reasons"]:
            counts[reason] = counts.get(reason, 0) + 1
    return [f"{count} of {len(records)} layers: {reason}" for reason, count in counts.items()]


def shapes(kv_heads: int) -> "Callable[[Any], Any]":
    """The change of a layer's shapes, for the plan that a dry run shows. Never run on values."""
    from dataclasses import replace

    def change(attention: Any) -> Any:
        if attention.k.device != torch.device("meta"):
            raise ValueError("an aligned plan is written by its fit")
        merged = pool_heads(attention, kv_heads, "mean", 0, 0.0)
        return replace(merged, q=attention.q, o=attention.o)

    return change
