"""Measurements as tables and plots: all models from the source on, side by side on the same text."""

from typing import Any

from upfit.evaluate.tables import half_width, interval
from upfit.output import human_bytes
from upfit.report import attention, encoder_decoder, figures, probes, speed, wording
from upfit.report.outcome import Outcome
from upfit.report.page import Plot, Section, Table
from upfit.report.subjects import Evaluation, Measured, Text, texts
from upfit.report.wording import where

INTERVALS = "Intervals are of 95 %."


def summary(evaluations: list[Evaluation], origin: dict[str, Any] | None = None) -> Section:
    """One row a model: its loss, how far from the source's, its cache, and each probe's average and gap."""
    tables = []
    for text in texts(evaluations, origin):
        columns = [*encoder_decoder.columns(text.models), *probes.columns(text.models)]
        rows = [
            [
                model.label,
                half_width(model.subject["loss"]["nats_per_token"], 4),
                _apart(model, text),
                _cache(model),
                *(cells[index] for _, cells in columns),
            ]
            for index, model in enumerate(text.models)
        ]
        head = ["model", "nats a token", "from the source", _of_tokens(text), *(title for title, _ in columns)]
        tables.append(Table(where(text.data), head, rows))
    words = (
        f"{INTERVALS} Loss: lower is better. Probes: the mean score over depths, and the gap between the best and the worst."
    )
    return Section("Every model beside the others", [words], tables=tables)


def says_more(evaluations: list[Evaluation], origin: dict[str, Any] | None, outcome: Outcome) -> bool:
    """Whether a summary tells of models, texts or probes of which the head of the page does not."""
    by_text = texts(evaluations, origin)
    if len(by_text) > 1 or any(probes.columns(text.models) for text in by_text):
        return True
    return any(len(text.models) > sum(stage.loss is not None for stage in outcome.stages) for text in by_text)


def measured(evaluations: list[Evaluation], origin: dict[str, Any] | None = None) -> list[Section]:
    """For each text a section of losses, cache and speed, one for each probe, and one of attention, models in their order."""
    sections = []
    for index, text in enumerate(texts(evaluations, origin)):
        number = index + 1
        sections += [_losses(text, number), *probes.sections(text.models, number), *attention.sections(text.models, number)]
    return sections


def _losses(text: Text, number: int) -> Section:
    rows = []
    for model in text.models:
        loss = model.subject["loss"]
        measures = [
            half_width(loss["nats_per_token"], 4),
            interval(loss["perplexity"], 2),
            half_width(loss["bits_per_byte"], 4),
        ]
        rows.append([model.label, *measures, _apart(model, text), _cache(model)])
    columns = ["model", "nats per token", "perplexity", "bits per byte", "against the source", _of_tokens(text)]
    same, beside = ("examples", f" {wording.GIVEN}") if "examples" in text.data else ("windows", "")
    words = (
        f"{where(text.data)}. {INTERVALS} Differences are paired on the same {same}, unless the table says otherwise.{beside}"
    )
    tables = [
        Table("Loss", columns, rows),
        *encoder_decoder.tables(text),
        *_tasks(text.models),
        *speed.tables(text),
        *_ablations(text.evaluations),
    ]
    shown, what = _shown(text)
    parts = [model.subject["loss"]["nats_per_token_by_position"] for model in text.models]
    plots = [
        Plot(
            f"losses-{number}",
            wording.LOSSES.format(what=what),
            figures.losses(shown, what),
        ),
        Plot(
            f"positions-{number}",
            wording.WRITTEN if "examples" in text.data else wording.POSITIONS,
            figures.positions(text.labels, parts, text.data["length"], "examples" in text.data),
        ),
        *speed.plots(text, number),
    ]
    return Section("What was measured", [words], tables=tables, plots=plots)


def _shown(text: Text) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """What the plot of losses is of: differences where any is paired, else the losses themselves."""
    if not any(model.difference and "nats_per_token" in model.difference for model in text.models):
        return [(model.label, model.subject["loss"]["nats_per_token"]) for model in text.models], "nats a token"
    shown = []
    for model in text.models:
        if model.difference and "nats_per_token" in model.difference:
            shown.append((model.label + _beside(model, text), model.difference["nats_per_token"]))
        elif (far := _unpaired(model, text)) is not None:
            shown.append((f"{model.label} (not paired)", {"mean": far, "low": None, "high": None}))
    return shown, "nats a token above the source"


def _apart(model: Measured, text: Text) -> str:
    """How far the loss is from the source's."""
    if model.difference is None:
        far = _unpaired(model, text)
        return "" if far is None else f"{far:.4f}, not paired"
    difference = model.difference
    if "nats_per_token" in difference:
        return half_width(difference["nats_per_token"], 4) + _beside(model, text)
    return f"{half_width(difference['bits_per_byte'], 4)} bits a byte{_beside(model, text)}"


def _beside(model: Measured, text: Text) -> str:
    """Says what a difference is from, where that is not the one source."""
    return "" if model.against == text.source else f" (from {model.against})"


def _unpaired(model: Measured, text: Text) -> float | None:
    """Of a model that was measured alone: its mean less the source's, on the same windows; None where that means nothing."""
    others_tokens = any(each.difference and "nats_per_token" not in each.difference for each in text.models)
    if model.difference or text.source in (None, model.label) or others_tokens:
        return None
    source = next(each for each in text.models if each.label == text.source)
    mine, its = (each.subject["loss"]["nats_per_token"]["mean"] for each in (model, source))
    return float(mine - its)


def _of_tokens(text: Text) -> str:
    """The title of a column."""
    return "cache a token written" if "examples" in text.data else "cache a token"


def _cache(model: Measured) -> str:
    cache = model.subject["cache"]
    return "none" if cache is None else human_bytes(cache["bytes_per_token"])


def _tasks(models: list[Measured]) -> list[Table]:
    """One table of all tasks of lm-evaluation-harness; evaluations of an older Upfit have none."""
    rows = []
    for model in models:
        for task, result in (model.subject.get("tasks") or {}).items():
            about = [str(result["documents"]), str(result["few_shot"] or 0), str(result["version"])]
            rows += [[f"{model.label}: {task}", name, interval(value, 3), *about] for name, value in result["metrics"].items()]
    columns = ["model: task", "metric", "value", "documents", "few-shot", "version"]
    return [Table("Tasks of lm-evaluation-harness", columns, rows)] if rows else []


def _ablations(evaluations: list[Evaluation]) -> list[Table]:
    rows = [
        [f"{label}, without {answer['ablation']['part']}", half_width(answer["ablation"]["nats_per_token"], 4)]
        for label, answer in evaluations
        if answer["ablation"]
    ]
    return [Table("What an added part is worth", ["", "nats a token more"], rows)] if rows else []
