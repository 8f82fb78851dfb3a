"""`--method aligned`: from calibration text (or kept statistics) to a plan whose rules take tensors that were fitted
beforehand."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from upfit.checkpoint.content import file_hash
from upfit.checkpoint.plan import Plan
from upfit.convert.fitting import Calibration, LayerFits, read_calibration
from upfit.convert.gqa.choice import Choice, statistics_for
from upfit.convert.gqa.convert_layers import convert_layers
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
        calibration = read_calibration(context, choice.calibration, choice.tokens, choice.length, choice.field)
    else:
        calibration = Calibration(statistics.sample, statistics.model)
    settings = Settings(choice.kv_heads, choice.refit)
    identity = {"recipe": "gqa", "config": plan.config, "statistics": file_hash(statistics.path) if statistics else None}
    layers = [layer for layer in context.architecture.layers if layer.geometry.kv_heads > choice.kv_heads]
    fits = LayerFits(context, calibration, "aligning", identity | asdict(settings), layers, several=True)
    convert_layers(fits, plan.config, statistics.layer if statistics else lambda path: None, settings)
    report: dict[str, Any] = {
        METHOD_RAN: "aligned",
        STATE: FITTED,
        "calibration": calibration.record(),
        "layers": fits.records,
    }
    report[HEAD_ORDER] = _head_order(context.architecture.layers, fits.records)
    label = f"→ {choice.kv_heads} key/value heads, aligned" + (", refitted" if choice.refit else "")
    return Plan(plan.config, fits.rules(label), notes=(*plan.notes, *_notes(fits.records)), report=report)


def _head_order(layers: "tuple[Layer, ...]", records: list[dict[str, Any]]) -> list[list[int]]:
    """The order of query heads in every layer of the model: as before where heads were not merged or not watched."""
    groups, orders = {record["layer"]: record["groups"] for record in records}, []
    for layer in layers:
        alone = [[head] for head in range(layer.geometry.kv_heads)]
        share = layer.geometry.heads // layer.geometry.kv_heads
        orders.append(head_order(groups.get(layer.path) or alone, share))
    return orders


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
