"""Does learning answers on long contexts (IN2) do more for a model than learning the same answers on short ones?

    python -m benchmarks.answers MODEL SCRATCH --text TEXT... --held HELD --results benchmarks/results/NAME.json
        [--items 400] [--min-tokens 1024] [--max-tokens 2048] [--seeds 3] [--families ...] [--probes ...]

Two arms from one start: `long`, questions whose answers stand anywhere in contexts of --min-tokens to --max-tokens, and
`short`, the control: the same questions with the same answers, asked of their own text alone (ordinary supervised fine-tuning
of the same size: as many examples and learned tokens, the same batches, rates and steps). A seed is an order of the questions.
Told are loss on HELD text, and average and gap of the probes by score and by nats of the true answer, before and after; those
whose pattern was trained on say so. MODEL's config is first told to take --max-tokens positions. Runs whose result stands in
SCRATCH already are not done again. Nothing is chosen here: rate, steps and families are given. Runs of words that HELD shares
with TEXT are counted, and stand in the results.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.parts import read_documents, shared_runs
from upfit.environment import environment
from upfit.evaluate.evaluate import evaluate
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.longcontext.options import Options as SynthOptions
from upfit.longcontext.synth import synth
from upfit.output import Output
from upfit.uptrain.config import resolve
from upfit.uptrain.train import uptrain

QUIET = Output(quiet=True)
ARMS = {"long": 0.0, "short": 1.0}  # share of the questions that are asked of their own text alone
FAMILIES = ["cloze", "neighbour", "code-line", "record", "chain", "count"]
PROBES = ["key-value", "val-document", "val-code"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", nargs="+", required=True, help="what questions are asked of")
    parser.add_argument("--held", required=True, help="text that nothing is asked of, for loss and probes")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="questions a step")
    parser.add_argument("--min-tokens", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--probes", nargs="+", default=PROBES)
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    base = _base(args)
    before = _measured(args, base, "before")
    rows: list[dict[str, Any]] = [{"arm": "before", "seed": None} | before]
    for seed in range(args.seeds):
        for arm, short_share in ARMS.items():
            rows.append({"arm": arm, "seed": seed} | _run(args, base, arm, short_share, seed))
            print(json.dumps(rows[-1]), flush=True)
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path) and key not in ("text", "held")}
    shared = shared_runs(read_documents([args.held]), read_documents(args.text))
    told = {
        "settings": settings,
        "shared_with_train": shared,
        "rows": rows,
        "summary": _summary(rows),
        "environment": environment(),
    }
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _base(args: argparse.Namespace) -> Path:
    """MODEL with as many positions as the contexts have tokens."""
    folder = args.scratch / "base"
    if not folder.exists():
        shutil.copytree(args.model, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = max(config["max_position_embeddings"], args.max_tokens)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _run(args: argparse.Namespace, base: Path, arm: str, short_share: float, seed: int) -> dict[str, Any]:
    questions, out = args.scratch / f"questions-{arm}", args.scratch / f"{arm}-{seed}"
    if not questions.exists():
        options = SynthOptions(
            tokenizer=str(base),
            items=args.items,
            families=args.families,
            min_tokens=args.min_tokens,
            max_tokens=args.max_tokens,
            short_share=short_share,
            segment_tokens=64,
        )
        synth(args.text, questions, options, QUIET)
    if not out.exists():
        # The budget is told in tokens, and a step takes as many questions of either arm.
        lengths = [len(ids) for ids, _ in _contexts(questions, base)]
        mean = sum(lengths) / len(lengths)
        tokens = round(mean * args.items * 0.9)
        batch = round(mean * (args.batch + 0.4))
        given = {
            "tokens": str(tokens),
            "batch_tokens": str(batch),
            "seed": seed,
            "holdout": args.items // 10,
            "save_every": "5m",
        }
        if args.learning_rate is not None:
            given["learning_rate"] = args.learning_rate
        uptrain(str(base), str(questions), out, resolve(None, given), True, False, QUIET)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = {"steps": lines[-1]["step"], "tokens": lines[-1]["tokens"], "answer_nats": [lines[0]["ce"], lines[-1]["ce"]]}
    return trained | _measured(args, out, f"{arm}-{seed}")


def _contexts(questions: Path, base: Path) -> Any:
    from upfit.longcontext.contexts import Contexts
    from upfit.longcontext.wording import Wording
    from upfit.text.tokenizer import load_tokenizer

    return Contexts(questions, Wording(load_tokenizer(str(base)), "plain"))


def _measured(args: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    kept = args.scratch / f"{name}.json"
    if not kept.exists():
        options = EvaluateOptions(
            data=[args.held],
            windows=32,
            length=512,
            probe=args.probes,
            probe_length=[args.min_tokens, args.max_tokens],
            probe_samples=args.samples,
            probe_depths=8,
        )
        kept.write_text(json.dumps(evaluate(str(folder), options, QUIET).record()), encoding="utf-8")
    told = json.loads(kept.read_text(encoding="utf-8"))["model"]
    probes = {}
    for probe, found in told["probes"].items():
        for length, row in found["lengths"].items():
            probes[f"{probe} {length}"] = {
                "trained_on": found["trained_on"],
                "score": row["average"]["mean"],
                "gap": row["gap"]["mean"],
                "null_gap_p95": row["null_gap"]["p95"],
                "nats": row["answer_nats_per_token"]["mean"],
                "nats_gap": row["nats_gap"]["mean"],
                "nats_null_gap_p95": row["nats_null_gap"]["p95"],
                "nats_by_depth": row["nats"],
            }
    return {"loss": told["loss"]["nats_per_token"]["mean"], "probes": probes}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each arm the mean over seeds with its 95 % interval, and long minus short, paired by seed."""
    names = [("loss", None), *((probe, key) for probe in rows[0]["probes"] for key in ("score", "gap", "nats", "nats_gap"))]
    told: dict[str, Any] = {}
    for name, key in names:
        values = {arm: np.array([_value(row, name, key) for row in rows if row["arm"] == arm]) for arm in ARMS}
        told[f"{name} {key}" if key else name] = {
            "before": _value(rows[0], name, key),
            **{arm: _interval(found) for arm, found in values.items()},
            "long_minus_short": _interval(values["long"] - values["short"]),
        }
    return told


def _value(row: dict[str, Any], name: str, key: str | None) -> float:
    return row["loss"] if key is None else row["probes"][name][key]


def _interval(values: np.ndarray) -> dict[str, float | None]:
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": float(values.mean()), "half_width": half}


if __name__ == "__main__":
    main()
