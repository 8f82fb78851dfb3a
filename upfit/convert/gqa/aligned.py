"""`--method aligned`: from calibration text (or kept statistics) to a plan whose rules take tensors that were fitted
beforehand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upfit.convert.calibrate import pick_device, sample_for
from upfit.convert.calibration import Statistics, is_statistics, open_statistics
from upfit.convert.fitted import keep, note_default_text, told_of
from upfit.convert.gqa.layer import Settings, Told
from upfit.convert.gqa.refit import convert_layers
from upfit.convert.recipe import Plan, Rule
from upfit.convert.stream import Stream
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
        if not choice.calibration:
            note_default_text(bench)
        sample = sample_for(bench.folder, bench.checkpoint, choice.calibration, choice.tokens, choice.length, bench.output)
    else:
        sample = kept.sample
    pieces, held = sample.batches()
    stream = Stream(bench.checkpoint, bench.architecture, pieces, pick_device())
    layers = [layer for layer in bench.architecture.layers if layer.geometry.kv_heads > choice.kv_heads]
    paths = {layer.path: layer for layer in layers}
    label = f"→ {choice.kv_heads} key/value heads, aligned" + (", refitted" if choice.refit else "")
    told: list[Told] = []
    rules: list[Rule] = []
    with bench.output.progress("aligning", len(layers)) as meter:
        steps = convert_layers(
            bench.checkpoint,
            bench.architecture,
            plan.config,
            stream,
            held,
            kept.layer if kept else lambda path: None,
            Settings(choice.kv_heads, choice.refit),
        )
        for one, tensors in steps:
            told.append(one)
            rules.append(keep(bench, paths[one.layer], tensors, label))
            meter.advance(1, _progress(one))
    report = {"calibration": told_of(sample), "layers": [one.record() for one in told]}
    notes = (*plan.notes, *_notes(told))
    return Plan(plan.config, tuple(rules), notes=notes, report=report)


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


def _progress(told: Told) -> str:
    error = told.fitted_error if told.fitted_error is not None else told.merged_error
    return f"{told.layer}" + (f" score error {error:.3f}" if error is not None else "")


def _notes(told: list[Told]) -> list[str]:
    """What was left out, each reason once with the number of layers it holds for."""
    counts: dict[str, int] = {}
    for one in told:
        for reason in one.reasons:
            counts[reason] = counts.get(reason, 0) + 1
    return [f"{count} of {len(told)} layers: {reason}" for reason, count in counts.items()]


def shapes(kv_heads: int) -> "Callable[[Any], Any]":
    """The change of a layer's shapes, for the plan that a dry run shows. Never run on values."""
    from dataclasses import replace

    from upfit.convert.gqa.merge import merge

    def change(attention: Any) -> Any:
        if attention.k.device != torch.device("meta"):
            raise ValueError("an aligned plan is written by its fit")
        merged = merge(attention, kv_heads, "mean", 0, 0.0)
        return replace(merged, q=attention.q, o=attention.o)

    return change
