"""The result of `upfit evaluate` as tables. Only reads the dictionary that `--json` prints."""

from typing import Any

from upfit.output import Output, human_bytes, human_count


def show(result: dict[str, Any], output: Output) -> None:
    """Print what `evaluate` returned: losses, their difference, the cache, and the timings where there are any."""
    subjects = [result["model"]] + ([result["against"]] if result["against"] else [])
    _show_losses(subjects, result["data"], output)
    if result["difference"]:
        _show_difference(result["difference"], output)
    if result["ablation"]:
        told = result["ablation"]
        worse = told["nats_per_token"]
        output.line(f"Without {told['part']}: {half_width(worse, 4)} nats a token more (paired, 95 % interval)")
    _show_caches(subjects, output)
    for name in subjects[0]["probes"] or ():
        if name == "needle":
            _show_needle(subjects, output)
        elif name == "position":
            _show_position(subjects, output)
        elif "lengths" in subjects[0]["probes"][name]:
            _show_depths(name, subjects, output)
        else:
            _show_task(name, subjects, output)
    if subjects[0]["tasks"]:
        _show_harness(subjects, result["task_differences"] or {}, output)
    if result["speed"]:
        _show_speed(result["speed"], output)


def interval(estimate: dict[str, Any], digits: int) -> str:
    """`36.87 [31.93, 42.58]`, no decimals from 1000 on; without the brackets where there is no interval."""
    mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
    digits = digits if mean < 1000 else 0
    return f"{mean:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def half_width(estimate: dict[str, Any], digits: int) -> str:
    """`3.6074 ± 0.1440`, for an interval that is symmetric."""
    mean, low = estimate["mean"], estimate["low"]
    return f"{mean:.{digits}f}" + ("" if low is None else f" ± {mean - low:.{digits}f}")


def _show_losses(subjects: list[dict[str, Any]], data: dict[str, Any], output: Output) -> None:
    title = f"Loss on {data['windows']} windows of {data['length']} tokens from {data['documents']} documents, 95 % intervals"
    rows = [
        [
            subject["name"],
            half_width(subject["loss"]["nats_per_token"], 4),
            interval(subject["loss"]["perplexity"], 2),
            half_width(subject["loss"]["bits_per_byte"], 4),
        ]
        for subject in subjects
    ]
    output.table(["model", "nats per token", "perplexity", "bits per byte"], rows, title)


def _show_difference(difference: dict[str, Any], output: Output) -> None:
    if "nats_per_token" in difference:
        output.line(f"Difference (paired): {half_width(difference['nats_per_token'], 4)} nats per token")
        output.line(f"Perplexity ratio:    {interval(difference['perplexity_ratio'], 4)}")
    else:
        output.line(f"Difference (paired): {half_width(difference['bits_per_byte'], 4)} bits per byte")


def _show_caches(subjects: list[dict[str, Any]], output: Output) -> None:
    rows = []
    for subject in subjects:
        cache = subject["cache"]
        if cache is None:
            rows.append([subject["name"], human_count(subject["parameters"]), "none", "", "", ""])
            continue
        beyond, window = cache["bytes_per_token_beyond"], cache["window"]
        past = "" if window is None else f"{'not measured' if beyond is None else human_bytes(beyond)} (from {window} tokens)"
        rows.append(
            [
                subject["name"],
                human_count(subject["parameters"]),
                human_bytes(cache["bytes_per_token"]),
                past,
                human_bytes(cache["fixed_bytes"]),
                " ".join(cache["dtypes"]),
            ]
        )
    columns = ["model", "parameters", "cache per token", "beyond the window", "fixed", "type"]
    if not any(row[3] for row in rows):
        columns, rows = columns[:3] + columns[4:], [row[:3] + row[4:] for row in rows]
    output.table(columns, rows, "Cache of one sequence, measured")


def _show_speed(speed: dict[str, Any], output: Output) -> None:
    rows = []
    for row in speed["rows"]:
        for key in ("model", "against"):
            if key not in row:
                continue
            rates = (_rate(row[key][f"{phase}_tokens_per_s"]) for phase in ("prefill", "decode"))
            rows.append([key, str(row["context"]), *rates, human_bytes(row[key]["cache_bytes"])])
        if "ratio" in row:
            first, second = row["model"]["cache_bytes"], row["against"]["cache_bytes"]
            held = f"{first / second:.2f} x" if second else ""
            rows.append(["ratio", str(row["context"]), _ratio(row["ratio"]["prefill"]), _ratio(row["ratio"]["decode"]), held])
    title = (
        f"Speed, {speed['batch']} sequence(s) at once, {speed['steps']} tokens decoded: median of {speed['repeats']} [min, max]"
    )
    output.table(["", "context", "prefill tokens/s", "decode tokens/s", "cache"], rows, title)


def _rate(spread: dict[str, float]) -> str:
    digits = 0 if spread["median"] >= 100 else 1
    return f"{spread['median']:.{digits}f} [{spread['low']:.{digits}f}, {spread['high']:.{digits}f}]"


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} x [{spread['low']:.2f}, {spread['high']:.2f}]"


def _show_needle(subjects: list[dict[str, Any]], output: Output) -> None:
    rows = []
    for subject in subjects:
        told = subject["probes"]["needle"]
        masses = [
            half_width(told[key], 3) if key in told else "" for key in ("attention_on_answer", "attention_on_first_token")
        ]
        logit = "" if told["largest_logit"] is None else f"{told['largest_logit']:.1f}"
        found = [half_width(told["accuracy"], 2), half_width(told["answer_nats_per_token"], 3)]
        rows.append([subject["name"], *found, *masses, logit, f"{told['largest_hidden']:.0f}"])
    head = ["model", "found", "nats per answer token", "attention on answer", "on first token", "top logit", "top hidden"]
    output.table(head, rows, "A needle in text, 95 % intervals")
    if any("maps" in subject["probes"]["needle"] for subject in subjects):
        _show_heads(subjects, output)


def _show_heads(subjects: list[dict[str, Any]], output: Output) -> None:
    """The heads whose maps were kept, and what share of their attention the answer has in each model."""
    told = [subject["probes"]["needle"] for subject in subjects]
    heads = dict.fromkeys((one["layer"], one["head"]) for each in told for one in each.get("maps", {"heads": []})["heads"])
    rows = [[f"layer {layer}, head {head}", *(_at(each, layer, head) for each in told)] for layer, head in heads]
    output.table(["", *(subject["name"] for subject in subjects)], rows, "Heads with most attention on the answer, mean share")


def _at(told: dict[str, Any], layer: int, head: int) -> str:
    kept = any((one["layer"], one["head"]) == (layer, head) for one in told.get("maps", {"heads": []})["heads"])
    return f"{told['attention_by_head'][layer][head]:.3f}" if kept else ""


def _show_depths(name: str, subjects: list[dict[str, Any]], output: Output) -> None:
    """Scores and nats with the gaps between depths, each beside what no effect of depth would show."""
    first = subjects[0]["probes"][name]
    rows = []
    for length in first["lengths"]:
        for subject in subjects:
            told = subject["probes"][name]
            row = told["lengths"][length]
            measured = [half_width(row["average"], 3), f"{row['floor']:.3f}", *_gap(row, "")]
            measured += [half_width(row["answer_nats_per_token"], 3), *_gap(row, "nats_")]
            rows.append([length, subject["name"], *measured, "yes" if told["trained_on"] else "no"])
    head = ["length", "model", "score", "floor", "gap (null 95 %)", "p", "nats a token", "gap (null 95 %)", "p", "trained on"]
    row = next(iter(first["lengths"].values()))
    title = f"{name.capitalize()}, {row['contexts']} contexts, {len(row['depths'])} depths, 95 % intervals over contexts"
    output.table(head, rows, title)


def _gap(row: dict[str, Any], prefix: str) -> list[str]:
    gap, null = row[f"{prefix}gap"]["mean"], row[f"{prefix}null_gap"]["p95"]
    return [f"{gap:.3f} ({null:.3f})", f"{row[f'{prefix}p_value']:.3f}"]


def _show_position(subjects: list[dict[str, Any]], output: Output) -> None:
    """The whole curve is in the JSON; here every fourth part of it."""
    rows = []
    for length in subjects[0]["probes"]["position"]["lengths"]:
        for subject in subjects:
            row = subject["probes"]["position"]["lengths"][length]
            parts = [half_width(part, 3) for part in row["intervals"][3::4]]
            rows.append([length, subject["name"], half_width(row["nats_per_token"], 4), *parts, str(row["windows"])])
    shares = [f"to {depth + 1 / 32:.0%}" for depth in row["depths"][3::4]]
    output.table(["length", "model", "nats per token", *shares, "windows"], rows, "Loss by position, 16 parts, every fourth")


def _show_task(name: str, subjects: list[dict[str, Any]], output: Output) -> None:
    task = subjects[0]["probes"][name]
    rows = []
    for split in task["splits"]:
        for subject in subjects:
            told = subject["probes"][name]["splits"][split]
            measured = [half_width(told["accuracy"], 3), half_width(told["nats_per_answer"], 3)]
            rows.append([split, subject["name"], *measured, f"{told['commonest_answer']:.3f}", str(told["answers"])])
    head = ["", "model", "right", "nats per answer", "commonest answer", "answers"]
    output.table(head, rows, f"{name.capitalize()}, {task['size']} {task['unit']} in distribution, 95 % intervals")


def _show_harness(subjects: list[dict[str, Any]], differences: dict[str, Any], output: Output) -> None:
    rows = []
    for label, first in subjects[0]["tasks"].items():
        for metric in first["metrics"]:
            for subject in subjects:
                told = subject["tasks"][label]
                rows.append([label, metric, subject["name"], interval(told["metrics"][metric], 3), str(told["documents"])])
        for metric, apart in differences.get(label, {}).items():
            kind = "ratio" if metric.endswith("_ratio") else "difference"
            rows.append([label, metric.removesuffix("_ratio"), kind, interval(apart, 3), ""])
    head = ["task", "metric", "model", "value", "documents"]
    output.table(head, rows, "Tasks of lm-evaluation-harness, 95 % intervals, differences paired by document")
