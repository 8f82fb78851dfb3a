"""A story told in sections: which figures are worth a table, which a plot. Pure: data in, sections out."""

from typing import Any

from upfit.convert.describe import as_rows
from upfit.evaluate.tables import half_width, interval
from upfit.output import human_bytes, human_count
from upfit.report import figures
from upfit.report.page import Plot, Section, Table
from upfit.report.story import Story

INTERVALS = "Intervals are of 95 %."


def tell(story: Story) -> list[Section]:
    """All sections that the folder and the results have something to say to."""
    sections = [_facts(story.facts)]
    if story.steps:
        sections.append(_history(story.steps))
    sections += [_predicted(label, told) for label, told in story.predictions]
    if story.evaluations:
        sections += measured(story.evaluations)
    number = 0
    newest = max((i for i, step in enumerate(story.steps) if step["verb"] == "uptrain"), default=None)
    for index, step in enumerate(story.steps):
        if step["verb"].startswith("convert"):
            number += 1
            sections += _conversion(step, number)
        elif step["verb"] == "uptrain":
            sections.append(_uptraining(step, story.training if index == newest else []))
    return sections


def _facts(facts: dict[str, Any]) -> Section:
    return Section("What it is", tables=[Table("", ["", ""], as_rows(facts))])


def _history(steps: list[dict[str, Any]]) -> Section:
    rows = [[step["verb"], str(step["source"].get("name", "")), step["date"][:10], _versions(step)] for step in steps]
    commands = [step["command"] for step in steps if "command" in step]
    table = Table("", ["step", "from", "date", "versions"], rows)
    return Section("What was done", commands=commands, tables=[table])


def _versions(step: dict[str, Any]) -> str:
    told = step["versions"]
    return ", ".join(f"{name} {told[name]}" for name in ("upfit", "torch", "transformers") if name in told)


def _predicted(label: str, told: dict[str, Any]) -> Section:
    rows = [
        [str(row["kv_heads"]), human_bytes(row["kv_bytes_per_token"]), *(_share(row[name]) for name in _ERRORS)]
        for row in told["totals"]
    ]
    columns = ["key/value heads", "KV cache a token", *(name.replace("_", " ") for name in _ERRORS)]
    text = (
        "Predicted from calibration text alone, before any refit: the share of the attention scores' variance, and of what the "
        "values bring to the output, that a merge in closed form would lose. They rank layers and numbers of heads; losses in "
        "nats are measured after a conversion."
    )
    caption = f"Predicted errors of each layer for each number of key/value heads ({label})"
    plot = Plot(f"sensitivity-{label}", caption, figures.sensitivity(told))
    return Section("What fewer heads would cost", [text], tables=[Table("", columns, rows)], plots=[plot])


_ERRORS = ("attention_error", "largest_attention_error", "output_error", "largest_output_error")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _conversion(step: dict[str, Any], number: int) -> list[Section]:
    """What a conversion measured; nothing when it measured nothing."""
    told, texts, plots, tables = step["measurements"], [], [], []
    before, after = told.get("kv_bytes_per_token", (0, 0))
    if before != after:
        texts.append(f"KV cache {human_bytes(before)} → {human_bytes(after)} a token, {before / after:.2f} times smaller.")
    verified = told.get("verify")
    if verified:
        texts.append(f"Verified: {verified['structure']}; {verified['numbers']}.")
    calibration = told.get("calibration")
    if calibration:
        texts.append(f"Calibrated on {calibration['tokens']:,} tokens, windows of {calibration['length']}.")
    rows = [row for row in told.get("layers") or [] if isinstance(row, dict)]
    left_out = [[row["layer"], "; ".join(row["reasons"])] for row in rows if row.get("reasons")]
    if left_out:
        tables.append(Table("Left out, because it would not be exact or could not be measured", ["layer", "what"], left_out))
    drawn = figures.layers(rows)
    if drawn is not None:
        plots.append(Plot(f"conversion-{number}", f"What {step['verb']} measured of each layer", drawn))
    if not (texts or tables or plots):
        return []
    return [Section(f"Conversion: {step['verb']}", texts, tables=tables, plots=plots)]


def _uptraining(step: dict[str, Any], lines: list[dict[str, Any]]) -> Section:
    told = step["measurements"]
    texts = [
        f"{human_count(told['tokens'])} tokens in {told['steps']:,} steps, {told['seconds']:,.0f} s, "
        f"{told['tokens_per_second']:,.0f} tokens/s, {told['skipped']} steps skipped."
    ]
    before, after = told["holdout"]["before"], told["holdout"]["after"]
    tables, plots, teacher = [], [], None
    if before:
        teacher = before.get("teacher_ce")
        rows = [[_LOSSES[key], f"{before[key]:.4f}", f"{after[key]:.4f}"] for key in _LOSSES if key in before and key in after]
        title = f"Held-out loss, {told['holdout_rows']} rows of the training data, nats a token"
        tables.append(Table(title, ["", "before", "after"], rows))
        if teacher is not None and before["ce"] > teacher:
            closed = (before["ce"] - after["ce"]) / (before["ce"] - teacher)
            texts.append(
                f"The teacher has {teacher:.4f}: {closed:.0%} of the gap to it is closed. (Cross-entropy also learns the "
                "text, which the teacher did not: above 100 % does not mean better elsewhere.)"
            )
    if lines:
        plots.append(Plot("training", "Every step of the uptraining", figures.training(lines, teacher)))
        drawn = figures.watched(lines)
        if drawn is not None:
            plots.append(Plot("watched", "What the converted attention said of itself while training", drawn))
    return Section("Uptraining", texts, tables=tables, plots=plots)


_LOSSES = {"ce": "cross-entropy to the text", "kl": "divergence from the teacher"}


def measured(evaluations: list[tuple[str, dict[str, Any]]]) -> list[Section]:
    """One section for all evaluations on the same text, in their order; a difference is always told beside its own source."""
    texts: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for label, told in evaluations:
        texts.setdefault(told["data"]["sha256"], []).append((label, told))
    return [_one_text(some, index + 1) for index, some in enumerate(texts.values())]


def _one_text(evaluations: list[tuple[str, dict[str, Any]]], number: int) -> Section:
    data = evaluations[0][1]["data"]
    subjects = _subjects(evaluations)
    rows = []
    for label, subject, difference in subjects:
        loss, cache = subject["loss"], subject["cache"]
        apart = difference["nats_per_token"] if difference and "nats_per_token" in difference else None
        rows.append(
            [
                label,
                half_width(loss["nats_per_token"], 4),
                interval(loss["perplexity"], 2),
                half_width(loss["bits_per_byte"], 4),
                "" if apart is None else half_width(apart, 4),
                "none" if cache is None else human_bytes(cache["bytes_per_token"]),
            ]
        )
    columns = ["model", "nats per token", "perplexity", "bits per byte", "against the source", "cache per token"]
    where = data["source"] if isinstance(data["source"], str) else ", ".join(data["source"])
    words = f"{data['windows']} windows of {data['length']} tokens from {data['documents']} documents ({where}). {INTERVALS} "
    words += "Differences are paired on the same windows."
    labels = [label for label, _, _ in subjects]
    tables = [Table("Loss", columns, rows), *_probes(subjects), *_tasks(subjects)]
    tables += [*_speeds(evaluations), *_ablations(evaluations)]
    apart = [(label, told["nats_per_token"]) for label, _, told in subjects if told and "nats_per_token" in told]
    alone = [(label, subject["loss"]["nats_per_token"]) for label, subject, _ in subjects]
    shown, what = (apart, "nats a token above the source, paired") if apart else (alone, "nats a token")
    parts = [subject["loss"]["nats_per_token_by_position"] for _, subject, _ in subjects]
    plots = [
        Plot(f"losses-{number}", f"Loss: {what}, 95 % intervals", figures.losses(shown, what)),
        Plot(f"positions-{number}", "Loss by position in the window", figures.positions(labels, parts, data["length"])),
    ]
    return Section("What was measured", [words], tables=tables, plots=plots)


def _subjects(evaluations: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """[label, subject, difference from the source]: a source that several were measured against stands once, first."""
    sources = {told["against"]["name"]: told["against"] for _, told in evaluations if told["against"]}
    found: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
        (f"source: {name}", subject, None) for name, subject in sources.items()
    ]
    return found + [(label, told["model"], told["difference"]) for label, told in evaluations]


def _probes(subjects: list[tuple[str, dict[str, Any], dict[str, Any] | None]]) -> list[Table]:
    tables = []
    names = dict.fromkeys(name for _, subject, _ in subjects for name in subject["probes"] or ())
    for name in names:
        some = [(label, subject["probes"][name]) for label, subject, _ in subjects if name in (subject["probes"] or ())]
        rows = []
        for label, told in some:
            for split, row in (told.get("splits") or told.get("lengths") or {"": told}).items():
                loss = row.get("answer_nats_per_token") or row.get("nats_per_answer") or row["nats_per_token"]
                right = row.get("accuracy") or row.get("average")
                rows.append([f"{label} {split}".strip(), half_width(right, 3) if right else "", half_width(loss, 3)])
        tables.append(Table(f"Probe: {name}", ["model", "right", "nats per answer"], rows))
    return tables


def _tasks(subjects: list[tuple[str, dict[str, Any], dict[str, Any] | None]]) -> list[Table]:
    """One table of all tasks of lm-evaluation-harness; evaluations of an older Upfit have none."""
    rows = []
    for label, subject, _ in subjects:
        for task, told in (subject.get("tasks") or {}).items():
            about = [str(told["documents"]), str(told["few_shot"] or 0), str(told["version"])]
            rows += [[f"{label}: {task}", name, interval(value, 3), *about] for name, value in told["metrics"].items()]
    columns = ["model: task", "metric", "value", "documents", "few-shot", "version"]
    return [Table("Tasks of lm-evaluation-harness", columns, rows)] if rows else []


def _speeds(evaluations: list[tuple[str, dict[str, Any]]]) -> list[Table]:
    tables = []
    for label, told in evaluations:
        if not told["speed"]:
            continue
        rows = []
        for row in told["speed"]["rows"]:
            for key in ("model", "against"):
                if key in row:
                    rates = [f"{row[key][f'{phase}_tokens_per_s']['median']:,.0f}" for phase in ("prefill", "decode")]
                    name = label if key == "model" else "the source"
                    rows.append([f"{name}, {row['context']} tokens", *rates, human_bytes(row[key]["cache_bytes"])])
        where = ", ".join(str(value) for value in told["hardware"].values() if isinstance(value, str))
        tables.append(Table(f"Speed on {where}", ["", "prefill tokens/s", "decode tokens/s", "cache"], rows))
    return tables


def _ablations(evaluations: list[tuple[str, dict[str, Any]]]) -> list[Table]:
    rows = [
        [f"{label}, without {told['ablation']['part']}", half_width(told["ablation"]["nats_per_token"], 4)]
        for label, told in evaluations
        if told["ablation"]
    ]
    return [Table("What an added part is worth", ["", "nats a token more"], rows)] if rows else []
