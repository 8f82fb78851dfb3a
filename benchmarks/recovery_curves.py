"""What it takes to recover: the same conversions uptrained by each method at equal FLOPs, beside the source on the same text.

    python -m benchmarks.recovery_curves SOURCE TEXT SCRATCH --starts aligned=FOLDER mean=FOLDER --budget 2M --choose-at 200k \
        --learning-rates 3e-4 1e-3 3e-3 --seeds 3 --results benchmarks/results/NAME.json

--budget is in tokens of distillation; what another method costs less or more it gets more or fewer tokens for (forward pass of
the model counted as `upfit plan` does, backward twice that, the teacher's forward pass counted). Each method runs --choose-at
with each learning rate and one seed, and the best of them runs the whole budget with every seed. TEXT is split by document into
three parts (parts.py): runs train on the first, rates are chosen by the loss on the second, every loss told is of the third,
measured --points times on the way. A best rate at an edge of the range says so. The control is SOURCE trained on the same text
with cross-entropy: what it gains is adaptation to the text, not recovery, so the gap of a conversion is to the control at equal
FLOPs, seed by seed. Runs whose folder stands in SCRATCH already are not done again. A plot goes beside the results.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parts import full_windows, read_documents, split, weave, windows_record
from upfit import provenance
from upfit.architecture.layers import bind
from upfit.checkpoint.reader import open_checkpoint, read_config
from upfit.environment import environment
from upfit.output import Output
from upfit.plan.trace import trace
from upfit.uptrain.config import resolve
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.train import uptrain

LAYERWISE_SHARE = 0.2  # of the FLOPs
METHODS = ("ce", "kl", "kl+ce", "layerwise+kl", "layerwise+ce", "layerwise+kl+ce")
SHARES = (0.5, 0.8, 0.9)  # of the gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("text", help="file or folder of text: split into parts to train on, to choose by and to report")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--starts", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budget", type=_count, default="2M")
    parser.add_argument("--choose-at", type=_count, default="200k", help="budget with which each learning rate is tried")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rates", type=float, nargs="+", required=True)
    parser.add_argument("--layerwise-rate", type=float, default=None, help="of that stage; default: what upfit chooses")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=10, help="measurements of the held-out rows on the way")
    parser.add_argument("--holdout", type=int, default=32, help="rows to choose rates by, and as many to report")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    text = prepared(args)
    starts = dict(start.split("=", 1) for start in args.starts)
    control = _best(args, "source", args.source, "ce")
    settings = {k: v for k, v in vars(args).items() if k in KEPT}
    told: dict[str, Any] = {"settings": settings, "text": text, "control": control, "runs": []}
    for name, folder in starts.items():
        for method in args.methods:
            told["runs"].append(row := _best(args, name, folder, method))
            if method.startswith("layerwise+"):  # the first stage measures no logits, but it began where the others did
                others = [other for other in told["runs"] if other["start"] == name and other is not row]
                for run in row["runs"] if others else []:
                    run["curve"].insert(0, others[0]["runs"][0]["curve"][0])
            row["gaps"] = [_gaps(*pair) for pair in zip(row["runs"], control["runs"], strict=True)]
            ends = [f"{run['curve'][-1][1]:.4f}" for run in row["runs"]]
            edge = "(edge of the range)" if row["at_edge"] else ""
            print(name, method, row["learning_rate"], edge, "ends at", *ends, "closed", row["gaps"], flush=True)
    args.results.write_text(json.dumps(told | {"environment": environment()}, indent=1) + "\n", encoding="utf-8")
    _plot(told, args.results.with_suffix(".png"))


KEPT = ("budget", "choose_at", "length", "learning_rates", "layerwise_rate", "seeds", "holdout")


def _count(text: str) -> int:
    return int(float(text[:-1]) * {"k": 1e3, "M": 1e6}[text[-1]])


@functools.cache
def flops(folder: str, teacher: str, length: int) -> dict[str, float]:
    """FLOPs a token of training by each method."""
    student, tutor = (trace(read_config(Path(place)), length, "float32") for place in (folder, teacher))
    with open_checkpoint(Path(folder)) as checkpoint:
        paths = [layer.path + "." for layer in bind(checkpoint.config, checkpoint.tensors).layers]
        projections = sum(info.numel for name, info in checkpoint.tensors.items() if name.startswith(tuple(paths)))
    body = tutor.forward - tutor.head  # layerwise makes no logits
    attention = 2.0 * projections + student.attention
    taught = 3 * student.forward + tutor.forward
    return {"ce": 3 * student.forward, "kl": taught, "kl+ce": taught, "layerwise": body + 3 * attention}


def prepared(args: argparse.Namespace) -> dict[str, Any]:
    """The three parts of the text, as tokens to train on with rows held out; what the results say of them."""
    parts = split(read_documents([args.text]))
    train = args.scratch / "parts" / "train"
    if not train.exists():
        prepare([str(parts.write(args.scratch / "parts")["train"])], train, args.source, "text", Output(quiet=True))
    held_out_parts = parts.items()[1:]
    # Equally many of both parts, so that all runs train on the same rows in the same order.
    args.holdout = min(len(full_windows(part, args.source, args.length, args.holdout)) for _, part in held_out_parts)
    record: dict[str, Any] = parts.record() | {"held_out": {}}
    for name, part in held_out_parts:
        held_out = full_windows(part, args.source, args.length, args.holdout)
        record["held_out"][name] = windows_record(held_out, args.length)
        if not (args.scratch / "parts" / name).exists():
            weave(train, held_out, args.length, args.scratch / "parts" / name)
    return record


def _best(args: argparse.Namespace, name: str, folder: str, method: str) -> dict[str, Any]:
    """The method's runs of the whole budget at the learning rate that was best in a short one."""
    tried = {rate: _run(args, name, folder, method, rate, args.choose_at, 0, "choose") for rate in args.learning_rates}
    rate = min(tried, key=lambda one: float(tried[one]["curve"][-1][1]))
    return {
        "start": name,
        "method": method,
        "learning_rate": rate,
        "at_edge": len(tried) < 3 or rate in (min(tried), max(tried)),
        "tried": {f"{one:g}": run["curve"][-1][1] for one, run in tried.items()},
        "runs": [_run(args, name, folder, method, rate, args.budget, seed, "report") for seed in range(args.seeds)],
    }


def _run(
    args: argparse.Namespace, name: str, folder: str, method: str, rate: float, budget: int, seed: int, part: str
) -> dict[str, Any]:
    """`curve`: [FLOPs in tokens of distillation, cross-entropy of `part` in nats a token], from before the first step."""
    out = args.scratch / f"{part}-{name}-{method}-{rate:g}-{budget}-{seed}"
    costs = flops(folder, args.source, args.length)
    unit = costs["kl"]
    settings: dict[str, Any] = {"length": args.length, "learning_rate": rate, "holdout": args.holdout, "seed": seed}
    tables: dict[str, dict[str, Any]] = {"distill": {"ce_weight": 1.0}} if method.endswith("kl+ce") else {}
    last = method.removeprefix("layerwise+")
    stage = "lm" if last == "ce" else "distill"
    if method != last:
        first = LAYERWISE_SHARE * budget * unit / costs["layerwise"]
        second = (1 - LAYERWISE_SHARE) * budget * unit / costs[last]
        share = first / (first + second)
        settings |= {"stages": f"layerwise={share:.4f},{stage}", "tokens": str(round(first + second))}
        tables |= {} if args.layerwise_rate is None else {"layerwise": {"learning_rate": args.layerwise_rate}}
    else:
        settings |= {"stages": stage, "tokens": str(round(budget * unit / costs[method]))}
    # About a hundred steps, or as many as there are rows. What only chooses a rate is measured before and after.
    every = max(1, min(100, budget // args.length) // args.points) if part == "report" else None
    if not out.exists():
        if method != "ce":
            settings["teacher"] = args.source
        config = resolve(None, settings | {"measure_every": every})
        uptrain(folder, str(args.scratch / "parts" / part), out, config, True, False, Output(quiet=True), tables)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [step for step in provenance.read(out) if step["verb"] == "uptrain"]
    whole = [step["measurements"]["holdout"] for step in trained if step["stage"] != "layerwise"][-1]
    spent = sum(costs["layerwise"] / unit * step["measurements"]["tokens"] for step in trained if step["stage"] == "layerwise")
    cost = costs[last] / unit
    curve = [[spent, whole["before"]["ce"]]]
    curve += [[spent + cost * line["tokens"], line["holdout_ce"]] for line in lines if "holdout_ce" in line]
    end = spent + cost * lines[-1]["tokens"]
    if curve[-1][0] < end:
        curve.append([end, whole["after"]["ce"]])
    return {"seed": seed, "curve": curve}


def _gaps(run: dict[str, Any], control: dict[str, Any]) -> dict[str, float | None]:
    """The FLOPs (in tokens of distillation) at which so much of the gap to the control is closed; None where it is not."""
    spent, losses = np.array(run["curve"]).T
    beside = np.interp(spent, *np.array(control["curve"]).T)
    closed = 1 - (losses - beside) / (losses[0] - beside[0])
    found: dict[str, float | None] = {"end": round(float(closed[-1]), 4)}
    for share in SHARES:
        over = np.flatnonzero(closed >= share)
        at = int(over[0]) if len(over) else -1
        if at > 0:
            found[f"{share:.0%}"] = round(float(np.interp(share, closed[at - 1 : at + 1], spent[at - 1 : at + 1])))
        else:
            found[f"{share:.0%}"] = None if at < 0 else round(float(spent[0]))
    return found


def _plot(told: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    starts = list(dict.fromkeys(row["start"] for row in told["runs"]))
    figure = Figure(figsize=(5 * len(starts), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts, strict=True):
        for number, run in enumerate(told["control"]["runs"]):
            label = None if number else "source, ce"
            axes.plot(*np.array(run["curve"]).T, color="black", linestyle="--", label=label)
        for number, row in enumerate(row for row in told["runs"] if row["start"] == start):
            for run in row["runs"]:
                label = f"{row['method']}, {row['learning_rate']:g}" if run is row["runs"][0] else None
                axes.plot(*np.array(run["curve"]).T, color=f"C{number}", label=label)
        axes.set_title(start)
        axes.set_xlabel("FLOPs, in tokens of distillation")
        axes.set_ylabel("held-out cross-entropy, nats a token")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
