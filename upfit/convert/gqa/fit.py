"""`--method aligned`: from calibration text (or kept statistics) to a plan whose rules take tensors that were fitted
beforehand."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upfit.calibration.sample import is_statistics
from upfit.calibration.statistics_file import Statistics, open_statistics
from upfit.checkpoint.content import file_hash
from upfit.checkpoint.plan import Plan
from upfit.convert.fitting import Calibration, Task, fit_layers, read_calibration
from upfit.convert.gqa.convert_layers import begin
from upfit.convert.gqa.layer_state import Settings
from upfit.convert.gqa.recipe import METHOD_RAN
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.convert.recipe import Bench


@dataclass(frozen=True)
class Choice:
    """What the user asked for. `calibration` names text, or one statistics file, or nothing."""

    kv_heads: int
    refit: bool
    calibration: list[str] | None
    tokens: str | None
    length: int | None


def fit(bench: "Bench", choice: Choice, plan: Plan) -> Plan:
    """Fit every layer and give `plan` rules that read the results, which stand in the bench's folder.

    Raises UpfitError for calibration text that cannot be used, Opaque for a model that cannot be run on text.
    """
    kept = statistics_for(bench, choice)
    if kept is None:
        calibration = read_calibration(bench, choice.calibration, choice.tokens, choice.length)
    else:
        calibration = Calibration(kept.sample, kept.model)
    settings = Settings(choice.kv_heads, choice.refit)
    task = Task(
        title="aligning",
        label=f"→ {choice.kv_heads} key/value heads, aligned" + (", refitted" if choice.refit else ""),
        settings={
            "recipe": "gqa",
            "config": plan.config,
            "statistics": file_hash(kept.path) if kept else None,
            **asdict(settings),
        },
        layers=[layer for layer in bench.architecture.layers if layer.geometry.kv_heads > choice.kv_heads],
        begin=lambda walk: begin(walk, plan.config, kept.layer if kept else lambda path: None, settings),
        note=_progress,
    )
    fitted = fit_layers(bench, calibration, task)
    report = {METHOD_RAN: "aligned", "calibration": calibration.record(), "layers": fitted.records}
    notes = (*plan.notes, *_notes(fitted.records))
    return Plan(plan.config, tuple(fitted.rules), notes=notes, report=report)


def statistics_for(bench: "Bench", choice: Choice) -> Statistics | None:
    """The statistics file among `choice.calibration`, opened; None when it names text, or nothing."""
    named = choice.calibration or []
    if not any(map(is_statistics, named)):
        return None
    if len(named) > 1:
        raise UpfitError("--calibration takes text, or one statistics file, not both; give the statistics file alone")
    if choice.tokens is not None or choice.length is not None:
        raise UpfitError(
            "--calibration-tokens and --calibration-length are those of the statistics file; leave them out, or give text"
        )
    return open_statistics(Path(named[0]).expanduser(), bench.checkpoint)


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

    from upfit.convert.gqa.pooling import merge

    def change(attention: Any) -> Any:
        if attention.k.device != torch.device("meta"):
            raise ValueError("an aligned plan is written by its fit")
        merged = merge(attention, kv_heads, "mean", 0, 0.0)
        return replace(merged, q=attention.q, o=attention.o)

    return change
