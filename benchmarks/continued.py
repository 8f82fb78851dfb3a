"""A new attention after the same uptraining from one start: is it any better than going on with the source?

    python -m benchmarks.continued MODEL SCRATCH --text TEXT... --tokens 2M --learning-rates 3e-4 1e-3 3e-3 --choose-at 200k \
        --results benchmarks/results/NAME.json

Three groups. `lossless` starts are the source itself and trained on the text (cross-entropy): the source continued,
differential v2, the same with nothing tied ([2W, -W], a plain model of twice the query heads), DEX. `lossy` starts learn from
the source (KL): split on calibration text, the naive split, DiffLlama on calibration text. `cope` starts are lossless too: the
source continued, contextual positions with content gates, with gate keys, and with constant gates, the control. Every run of a
group sees the same tokens in the same order (a seed is an order). TEXT is split by document into three parts (parts.py): runs
train on the first; where several learning rates are given, each start takes the one that is best on the second after
--choose-at tokens; loss and needle before and after are told of the third, and of contextual positions what they are worth
(their embeddings zeroed). A row's interval is over seeds, of the difference from the source as it was; `after_over_source` is
that from the source continued, seed by seed. Runs whose result stands in SCRATCH already are not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.parts import read_documents, split
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.environment import environment
from upfit.evaluate.evaluate import evaluate
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.output import Output
from upfit.uptrain.config import resolve
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.train import uptrain

QUIET = Output(quiet=True)
Starts = dict[str, dict[str, Any] | None]  # options of the conversion; None: the source itself
LOSSLESS: Starts = {
    "source": None,
    "v2": {},
    "[2W, -W]": {"variant": "v2-static"},
    "dex": {"variant": "dex"},
}
LOSSY: Starts = {
    "split": {"variant": "split"},
    "split, naive": {"variant": "split", "naive": True},
    "diffllama": {"variant": "diffllama"},
}
COPE: Starts = {"source": None, "content": {}, "keys": {"gates": "keys"}, "constant": {"gates": "constant"}}
CALIBRATED = {"split", "diffllama", "content", "keys"}
TEXT_ALONE, TEACHER_ALONE = {"ce_weight": 1.0, "kl_weight": 0.0}, {"ce_weight": 0.0, "kl_weight": 1.0}
GROUPS: dict[str, tuple[str, Starts, dict[str, float]]] = {  # recipe, starts, objective
    "lossless": ("diff", LOSSLESS, TEXT_ALONE),
    "lossy": ("diff", LOSSY, TEACHER_ALONE),
    "cope": ("cope", COPE, TEXT_ALONE),
}


WATCHED = ("lambda", "cosine", "size", "span", "saturated", "position_content")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", nargs="+", required=True, help="split into parts to train on, to choose by and to report")
    parser.add_argument("--calibration", nargs="+", help="text for starts that are fitted; default: what is trained on")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--without", nargs="+", default=[], help="starts to leave out, such as diffllama where heads are odd")
    parser.add_argument("--tokens", default="2M")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[None], help="one, or several to choose from")
    parser.add_argument("--choose-at", default="200k", help="budget with which each of several learning rates is tried")
    parser.add_argument("--calibration-tokens", default="64k")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    text = _prepared(args)
    rows = []
    for group in args.groups:
        for name, options in GROUPS[group][1].items():
            if name not in args.without:
                rows.append(_row(args, group, name, options))
                print(json.dumps({key: rows[-1][key] for key in ("group", "start", "before", "after", "needle")}), flush=True)
    controls = {row["group"]: row["after"]["values"] for row in rows if row["start"] == "source"}
    for row in rows:
        if row["group"] in controls and row["start"] != "source":
            pairs = zip(row["after"]["values"], controls[row["group"]], strict=True)
            row["after_over_source"] = _over_seeds([own - other for own, other in pairs])
    name = Path(args.model).name if Path(args.model).is_absolute() else args.model
    told = {"model": name, "tokens": args.tokens, "seeds": args.seeds, "choose_at": args.choose_at, "text": text, "rows": rows}
    told["environment"] = environment()
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _prepared(args: argparse.Namespace) -> dict[str, Any]:
    """The three parts of TEXT as `args.parts`, the first as tokens too; what the results say of them."""
    parts = split(read_documents(args.text))
    args.parts = parts.write(args.scratch / "parts")
    args.data = args.scratch / "parts" / "train"
    args.calibration = args.calibration or [str(args.parts["train"])]
    if not args.data.exists():
        prepare([str(args.parts["train"])], args.data, args.model, "text", QUIET)
    return parts.record()


def _row(args: argparse.Namespace, group: str, name: str, options: dict[str, Any] | None) -> dict[str, Any]:
    start = args.scratch / "start" / name.replace(" ", "").replace(",", "-")
    if options is None:
        start = Path(args.model)
    elif not start.exists():
        start.parent.mkdir(exist_ok=True)
        recipe = find_recipes()[GROUPS[group][0]]
        if name in CALIBRATED:
            options = {**options, "calibration": args.calibration, "calibration_tokens": args.calibration_tokens}
        convert(recipe, args.model, start, recipe.options(**options), Settings(verify=False), QUIET)
    ablate = "cope" if group == "cope" and options is not None else None
    before = _measured(args, start, args.scratch / f"before-{start.name}.json")
    rate, tried = _rate(args, group, start)
    runs = [_run(args, group, start, seed, rate, ablate) for seed in range(args.seeds)]
    told = {} if ablate is None else {"worth": _over_seeds([run["worth"]["mean"] for run in runs])}
    return told | {
        "group": group,
        "start": name,
        "learning_rate": rate,
        "tried": tried,
        "text": before["text"],
        "before": before["difference"],
        "after": _over_seeds([run["difference"]["mean"] for run in runs]),
        "needle": _over_seeds([run["needle"]["accuracy"]["mean"] for run in runs]),
        "attention_on_answer": _over_seeds([run["needle"]["attention_on_answer"]["mean"] for run in runs]),
        "needle_before": before["needle"],
        "runs": runs,
    }


def _rate(args: argparse.Namespace, group: str, start: Path) -> tuple[float | None, dict[str, float]]:
    """The learning rate that is best on the part to choose by, and the loss there after each."""
    if len(args.learning_rates) < 2:
        return args.learning_rates[0], {}
    tried = {}
    for rate in args.learning_rates:
        out = args.scratch / f"choose-{group}-{start.name}-{rate:g}"
        _train(args, group, start, out, args.choose_at, 0, rate)
        tried[rate] = float(_measured(args, out, args.scratch / f"{out.name}.json", part="choose")["loss"]["mean"])
    return min(tried, key=lambda rate: tried[rate]), {f"{rate:g}": loss for rate, loss in tried.items()}


def _train(args: argparse.Namespace, group: str, start: Path, out: Path, tokens: str, seed: int, rate: float | None) -> None:
    if not out.exists():
        settings = {"tokens": tokens, "length": args.length, "seed": seed, "holdout": 0, **GROUPS[group][2]}
        teacher = {"teacher": args.model} if group == "lossy" else {}
        resolved = resolve(None, settings | teacher | {"learning_rate": rate})
        uptrain(str(start), str(args.data), out, resolved, True, False, QUIET)


def _run(
    args: argparse.Namespace, group: str, start: Path, seed: int, rate: float | None, ablate: str | None
) -> dict[str, Any]:
    out = args.scratch / f"{group}-{start.name}-{seed}"
    _train(args, group, start, out, args.tokens, seed, rate)
    told = _measured(args, out, args.scratch / f"{out.name}.json", ablate)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    watched = {key: lines[-1][key] for key in WATCHED if key in lines[-1]}
    return {"seed": seed, **told, **watched}


def _measured(
    args: argparse.Namespace, folder: Path, kept: Path, ablate: str | None = None, part: str = "report"
) -> dict[str, Any]:
    """Loss against the source and the needle on a part of the text, in float32."""
    if not kept.exists():
        options = EvaluateOptions(
            against=args.model,
            data=[str(args.parts[part])],
            length=args.length,
            windows=args.windows,
            probe=["needle"] if part == "report" else [],
            dtype="float32",
            ablate=ablate,
        )
        told = evaluate(str(folder), options, QUIET).record()
        content = {
            "loss": told["model"]["loss"]["nats_per_token"],
            "difference": told["difference"]["nats_per_token"],
            "needle": told["model"]["probes"]["needle"] if part == "report" else None,
            "text": {key: told["data"][key] for key in ("documents", "windows", "length", "tokens")},
        }
        if ablate is not None:
            content["worth"] = told["ablation"]["nats_per_token"]
        kept.write_text(json.dumps(content), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def _over_seeds(values: list[float]) -> dict[str, Any]:
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "values": values}
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}


if __name__ == "__main__":
    main()
