"""The result of `upfit evaluate` as tables. Probes come as pairs of a model's name and what was found of it."""

import math
from typing import Any

from upfit.evaluate.interval import Interval
from upfit.evaluate.measures import Difference, Speed, Spread, Subject, Text
from upfit.evaluate.probes.summaries import DepthRow, Depths, Needle, Position, SyntheticTask
from upfit.output import Output, human_bytes, human_count


def interval(estimate: dict[str, Any], digits: int) -> str:
    """The dictionary of an Interval as `Interval.ends` says it."""
    return Interval(estimate["mean"], estimate["low"], estimate["high"]).ends(digits)


def half_width(estimate: dict[str, Any], digits: int) -> str:
    """The dictionary of an Interval as `Interval.half_width` says it."""
    return Interval(estimate["mean"], estimate["low"], estimate.get("high")).half_width(digits)


def show_losses(subjects: list[Subject], data: Text, output: Output) -> None:
    title = f"Loss on {data.windows} windows of {data.length} tokens from {data.documents} documents, 95 % intervals"
    rows = [
        [
            subject.name,
            subject.loss.nats_per_token.half_width(4),
            subject.loss.perplexity.ends(2),
            subject.loss.bits_per_byte.half_width(4),
        ]
        for subject in subjects
    ]
    output.table(["model", "nats per token", "perplexity", "bits per byte"], rows, title)


def show_difference(difference: Difference, output: Output) -> None:
    if difference.nats_per_token is not None and difference.perplexity_ratio is not None:
        output.line(f"Difference (paired): {difference.nats_per_token.half_width(4)} nats per token")
        output.line(f"Perplexity ratio:    {difference.perplexity_ratio.ends(_digits(difference.perplexity_ratio))}")
    else:
        output.line(f"Difference (paired): {difference.bits_per_byte.half_width(4)} bits per byte")


def _digits(interval: Interval) -> int:
    """Decimals that show two figures of the half width of an interval, at most four; three where there is none."""
    if interval.low is None or not interval.low < interval.mean:
        return 3
    return min(4, max(0, 1 - math.floor(math.log10(interval.mean - interval.low))))


def show_caches(subjects: list[Subject], output: Output) -> None:
    rows = [[subject.name, human_count(subject.parameters), *_cache(subject)] for subject in subjects]
    columns = ["model", "parameters", "cache per token", "beyond the window", "fixed", "type"]
    if not any(row[3] for row in rows):
        columns, rows = columns[:3] + columns[4:], [row[:3] + row[4:] for row in rows]
    output.table(columns, rows, "Cache of one sequence, measured")


def _cache(subject: Subject) -> list[str]:
    cache = subject.cache
    if cache is None:
        return ["none", "", "", ""]
    beyond, window = cache.bytes_per_token_beyond, cache.window
    past = "" if window is None else f"{'not measured' if beyond is None else human_bytes(beyond)} (from {window} tokens)"
    return [human_bytes(cache.bytes_per_token), past, human_bytes(cache.fixed_bytes), " ".join(cache.dtypes)]


def show_speed(speed: Speed, output: Output) -> None:
    rows = []
    for row in speed.rows:
        for name, timing in (("model", row.model), ("against", row.against)):
            if timing is not None:
                rates = [_rate(timing.prefill_tokens_per_s), _rate(timing.decode_tokens_per_s)]
                rows.append([name, str(row.context), *rates, human_bytes(timing.cache_bytes)])
        if row.ratio is not None and row.against is not None:
            first, second = row.model.cache_bytes, row.against.cache_bytes
            held = f"{first / second:.2f} x" if second else ""
            rows.append(["ratio", str(row.context), _ratio(row.ratio.prefill), _ratio(row.ratio.decode), held])
    title = f"Speed, {speed.batch} sequence(s) at once, {speed.steps} tokens decoded: median of {speed.repeats} [min, max]"
    output.table(["", "context", "prefill tokens/s", "decode tokens/s", "cache"], rows, title)


def _rate(spread: Spread) -> str:
    digits = 0 if spread.median >= 100 else 1
    return f"{spread.median:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} x [{spread.low:.2f}, {spread.high:.2f}]"


def show_needle(probes: list[tuple[str, Needle]], output: Output) -> None:
    rows = []
    for model, needle in probes:
        masses = [needle.attention_on_answer, needle.attention_on_first_token]
        shares = ["" if mass is None else mass.half_width(3) for mass in masses]
        logit = "" if needle.largest_logit is None else f"{needle.largest_logit:.1f}"
        right = [needle.accuracy.half_width(2), needle.answer_nats_per_token.half_width(3)]
        rows.append([model, *right, *shares, logit, f"{needle.largest_hidden:.0f}"])
    head = ["model", "found", "nats per answer token", "attention on answer", "on first token", "top logit", "top hidden"]
    output.table(head, rows, "A needle in text, 95 % intervals")
    if any(needle.maps is not None for _, needle in probes):
        _show_heads(probes, output)


def _show_heads(probes: list[tuple[str, Needle]], output: Output) -> None:
    """The heads whose maps were kept, and what share of their attention the answer has in each model."""
    heads = dict.fromkeys(head for _, needle in probes for head in _shown(needle))
    rows = [[f"layer {layer}, head {head}", *(_at(needle, layer, head) for _, needle in probes)] for layer, head in heads]
    output.table(["", *(model for model, _ in probes)], rows, "Heads with most attention on the answer, mean share")


def _shown(needle: Needle) -> list[tuple[int, int]]:
    return [(row["layer"], row["head"]) for row in (needle.maps or {"heads": []})["heads"]]


def _at(needle: Needle, layer: int, head: int) -> str:
    by_head = needle.attention_by_head
    return f"{by_head[layer][head]:.3f}" if by_head is not None and (layer, head) in _shown(needle) else ""


def show_depths(name: str, probes: list[tuple[str, Depths]], output: Output) -> None:
    """Scores and nats with the gaps between depths, each beside what no effect of depth would show."""
    lengths = probes[0][1].lengths
    rows = []
    for length in lengths:
        for model, probe in probes:
            row = probe.lengths[length]
            measured = [row.average.half_width(3), f"{row.floor:.3f}", *_gap(row)]
            measured += [row.answer_nats_per_token.half_width(3), *_nats_gap(row)]
            rows.append([length, model, *measured, "yes" if probe.trained_on else "no"])
    head = ["length", "model", "score", "floor", "gap (null 95 %)", "p", "nats a token", "gap (null 95 %)", "p", "trained on"]
    first = next(iter(lengths.values()))
    title = f"{name.capitalize()}, {first.contexts} contexts, {len(first.depths)} depths, 95 % intervals over contexts"
    output.table(head, rows, title)


def _gap(row: DepthRow) -> list[str]:
    return [f"{row.gap.mean:.3f} ({row.null_gap.p95:.3f})", f"{row.p_value:.3f}"]


def _nats_gap(row: DepthRow) -> list[str]:
    return [f"{row.nats_gap.mean:.3f} ({row.nats_null_gap.p95:.3f})", f"{row.nats_p_value:.3f}"]


def show_position(probes: list[tuple[str, Position]], output: Output) -> None:
    """The whole curve is in the JSON; here every fourth part of it."""
    rows = []
    for length in probes[0][1].lengths:
        for model, position in probes:
            row = position.lengths[length]
            parts = [part.half_width(3) for part in row.intervals[3::4]]
            rows.append([length, model, row.nats_per_token.half_width(4), *parts, str(row.windows)])
    shares = [f"to {depth + 1 / 32:.0%}" for depth in row.depths[3::4]]
    output.table(["length", "model", "nats per token", *shares, "windows"], rows, "Loss by position, 16 parts, every fourth")


def show_task(name: str, probes: list[tuple[str, SyntheticTask]], output: Output) -> None:
    task = probes[0][1]
    rows = []
    for split in task.splits:
        for model, answered in probes:
            row = answered.splits[split]
            measured = [row.accuracy.half_width(3), row.nats_per_answer.half_width(3)]
            rows.append([split, model, *measured, f"{row.commonest_answer:.3f}", str(row.answers)])
    head = ["", "model", "right", "nats per answer", "commonest answer", "answers"]
    output.table(head, rows, f"{name.capitalize()}, {task.size} {task.unit} in distribution, 95 % intervals")


def show_harness(subjects: list[Subject], differences: dict[str, dict[str, Interval]], output: Output) -> None:
    rows = []
    for label, first in (subjects[0].tasks or {}).items():
        scores = [(subject.name, (subject.tasks or {})[label]) for subject in subjects]
        for metric in first.metrics:
            rows += [[label, metric, name, task.metrics[metric].ends(3), str(task.documents)] for name, task in scores]
        for metric, difference in differences.get(label, {}).items():
            kind = "ratio" if metric.endswith("_ratio") else "difference"
            rows.append([label, metric.removesuffix("_ratio"), kind, difference.ends(3), ""])
    head = ["task", "metric", "model", "value", "documents"]
    output.table(head, rows, "Tasks of lm-evaluation-harness, 95 % intervals, differences paired by document")
