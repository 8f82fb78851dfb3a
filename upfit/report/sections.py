"""Makes sections of a story: which numbers become a table, which a plot. Pure: data in, sections out."""

from typing import Any

from upfit.convert.result import as_rows
from upfit.output import cache_change, cache_size, human_count
from upfit.provenance import config_lines, method_ran
from upfit.report import figures, wording
from upfit.report.first_screen import first_screen
from upfit.report.measured import measured, says_more, summary
from upfit.report.page import Plot, Section, Table, file_name
from upfit.report.stages import outcome
from upfit.report.story import Story, same_run
from upfit.report.subjects import called
from upfit.report.wording import calibrated


def tell(story: Story) -> list[Section]:
    """All sections that the folder and the results have something to say to."""
    origin = next((step["source"] for step in story.steps if step["verb"].startswith("convert")), None)
    result = outcome(story)
    sections = [] if result is None else [first_screen(result)]
    if story.evaluations and (result is None or says_more(story.evaluations, origin, result)):
        sections.append(summary(story.evaluations, origin))
    sections.append(_facts(story.facts))
    if story.steps:
        sections.append(_history(story.steps))
    sections += measured(story.evaluations, origin)
    sections += [_predicted(label, prediction) for label, prediction in story.predictions]
    number = 0
    newest = next((step for step in reversed(story.steps) if step["verb"] == "uptrain"), None)
    for step in story.steps:
        if step["verb"].startswith("convert"):
            number += 1
            sections += _conversion(step, number)
        elif step["verb"] == "uptrain":
            stages = newest is not None and step is not newest and same_run(step, newest)
            lines = [line for line in story.training if line.get("stage", step.get("stage")) == step.get("stage")]
            sections.append(_uptraining(step, lines if step is newest or stages else []))
    return sections


def _facts(facts: dict[str, Any]) -> Section:
    return Section("What it is", tables=[Table("", ["", ""], as_rows(facts))])


def _history(steps: list[dict[str, Any]]) -> Section:
    rows = [[step["verb"], called(step["source"]), step["date"][:10], _versions(step)] for step in steps]
    pairs = zip(steps, [*steps[1:], None], strict=True)
    commands = [step["command"] for step, after in pairs if "command" in step and not same_run(step, after)]
    table = Table("", ["step", "from, or against", "date", "versions"], rows)
    files = [f"In the config file of {step['verb']}: {', '.join(config_lines(step))}." for step in steps if step.get("config")]
    return Section("What was done", list(dict.fromkeys(files)), commands=commands, tables=[table])


def _versions(step: dict[str, Any]) -> str:
    versions = step["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in ("upfit", "torch", "transformers") if name in versions)


def _predicted(label: str, prediction: dict[str, Any]) -> Section:
    rows = [
        [
            str(row["kv_heads"]),
            cache_size(row["kv_bytes_per_token"], row.get("cross_bytes_per_position")),
            *(_share(row[name]) for name in _ERRORS),
        ]
        for row in prediction["totals"]
    ]
    columns = ["key/value heads", "KV cache", *(name.replace("_", " ") for name in _ERRORS)]
    text = (
        "Predicted from calibration text alone, before any refit: the share of the attention scores' variance, and of what the "
        "values bring to the output, that a merge in closed form would lose. They rank layers and numbers of heads; losses in "
        "nats are measured after a conversion."
    )
    caption = wording.SENSITIVITY.format(label=label)
    plot = Plot(f"sensitivity-{file_name(label)}", caption, figures.sensitivity(prediction))
    return Section("What fewer heads would cost", [text], tables=[Table("", columns, rows)], plots=[plot])


_ERRORS = ("attention_error", "largest_attention_error", "output_error", "largest_output_error")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _conversion(step: dict[str, Any], number: int) -> list[Section]:
    """What a conversion measured; nothing when it measured nothing."""
    measured, texts, plots, tables = step["measurements"], [], [], []
    before, after = measured.get("kv_bytes_per_token", (0, 0))
    if before != after:
        texts.append(f"{cache_change(before, after, measured.get('cross_bytes_per_position'))}.")
    if method_ran(step):
        texts.append(f"Heads merged: {method_ran(step)}.")
    verified = measured.get("verify")
    if verified:
        texts.append(f"Verified: {verified['structure']}; {verified['numbers']}.")
    calibration = measured.get("calibration")
    if calibration:
        texts.append(calibrated(calibration))
    rows = [row for row in measured.get("layers") or [] if isinstance(row, dict)]
    left_out = [[row["layer"], "; ".join(row["reasons"])] for row in rows if row.get("reasons")]
    if left_out:
        tables.append(Table("Left out, because it would not be exact or could not be measured", ["layer", "what"], left_out))
    drawn = figures.layers(rows)
    if drawn is not None:
        plots.append(Plot(f"conversion-{number}", wording.LAYERS.format(verb=step["verb"]), drawn))
    if not (texts or tables or plots):
        return []
    return [Section(f"Conversion: {step['verb']}", texts, tables=tables, plots=plots)]


def _uptraining(step: dict[str, Any], lines: list[dict[str, Any]]) -> Section:
    measured = step["measurements"]
    texts = [
        f"{human_count(measured['tokens'])} tokens in {measured['steps']:,} steps, {measured['seconds']:,.0f} s, "
        f"{measured['tokens_per_second'] or 0:,.0f} tokens/s, {measured['skipped']} steps skipped."
    ]
    data = step.get("data") or {}
    if "items" in data:
        texts.append(f"Answers of {data['items']:,} examples from {data.get('folder', 'a folder not told')}.")
    if data.get("patterns"):
        texts.append(f"Patterns trained on: {', '.join(data['patterns'])}. A probe of one of them asks what was taught.")
    tables, plots, teacher = [], [], None
    holdout = measured.get("holdout") or {}
    before, after = holdout.get("before") or {}, holdout.get("after") or {}
    told_of = [key for key in sorted(before, key=_place) if key in after and _name(key) and (before[key] or after[key])]
    rows = [[_name(key), f"{before[key]:.4f}", f"{after[key]:.4f}"] for key in told_of]
    if rows:
        unit = "error" if "attention_error" in before else "loss, nats a token"
        title = f"Held-out {unit}, {measured['holdout_rows']} rows of the training data"
        tables.append(Table(title, ["", "before", "after"], rows))
        teacher = before.get("teacher_ce")
    if teacher is not None and "ce" in after and before["ce"] > teacher:
        closed = (before["ce"] - after["ce"]) / (before["ce"] - teacher)
        texts.append(
            f"The teacher has {teacher:.4f}: {closed:.0%} of the gap to it is closed. (Cross-entropy also learns the "
            "text, which the teacher did not: above 100 % does not mean better elsewhere.)"
        )
    stage = step.get("stage")
    suffix = f"-{stage}" if stage in TITLES else ""
    drawn = figures.training(lines, teacher, before.get("kl"))
    if drawn is not None:
        plots.append(
            Plot(
                f"training{suffix}",
                wording.TRAINING,
                drawn,
            )
        )
    drawn = figures.watched(lines)
    if drawn is not None:
        plots.append(
            Plot(
                f"watched{suffix}",
                wording.WATCHED,
                drawn,
            )
        )
    title = "Uptraining" + TITLES.get(stage or "", "")
    return Section(title, texts, tables=tables, plots=plots)


TITLES = {"answers": " on answers", "layerwise": ", layer by layer", "lm": " on the text alone"}
_LOSSES = {
    "attention_error": "attention outputs, squared distance in units of the teacher's mean square",
    "ce": "cross-entropy to the text",
    "kl": "divergence from the teacher",
    "mix_ce": "cross-entropy to the text mixed in",
    "mix_kl": "divergence from the teacher, on the text mixed in",
}


def _name(key: str) -> str:
    """What is measured under `key`, as `ce` or, of the rows of one source alone, `code/ce`; "" for what no table shows."""
    source, _, kind = key.rpartition("/")
    loss = _LOSSES.get(kind, "")
    return f"{loss}, {source} alone" if loss and source else loss


def _place(key: str) -> tuple[int, str]:
    """Where `key` stands: kinds in the order of _LOSSES, each before what its sources have."""
    source, _, kind = key.rpartition("/")
    return (list(_LOSSES).index(kind) if kind in _LOSSES else len(_LOSSES)), source
