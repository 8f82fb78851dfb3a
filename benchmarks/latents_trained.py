"""What uptraining brings back of converted models, beside each other: loss against tokens.

    python -m benchmarks.latents_trained SOURCE TEXT SCRATCH --starts latent=FOLDER heads=FOLDER --budgets 12k 25k 50k \
        --results benchmarks/results/NAME.json

TEXT is split by document (parts.py): runs train on the first part, on the same rows in the same order; losses are of windows of
the third, in nats a token over SOURCE as it is, paired, with intervals over documents, and between the first start and each
other one. Each budget is a run of its own, whose rate falls to its end; what is measured is the folder that it wrote, loaded
anew. With several --learning-rates each start takes the one that ends lowest on the second part, at the largest budget, and
says where that is an edge. Convert on the first part too (`--parts` writes the parts and ends). Runs whose folder stands in
SCRATCH already are not done again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.latents import measure, numbers
from benchmarks.parts import Parts, full_windows, read_documents, split, windows_record
from benchmarks.small_merges import QUIET, over
from upfit.checkpoint.source import find_source
from upfit.environment import environment
from upfit.evaluate.loss import Losses
from upfit.options import parse_count
from upfit.text.windows import Window
from upfit.uptrain.config import resolve
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.train import uptrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("text", help="file or folder of text: split into parts to train on, to choose by and to report")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--parts", action="store_true", help="write the parts to SCRATCH/parts, for conversions, and end")
    parser.add_argument("--starts", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--budgets", nargs="+", default=["12k", "25k", "50k"])
    parser.add_argument("--stages", default="lm")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[None], help="default: what upfit chooses")
    parser.add_argument("--batch-tokens", default="2k")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48, help="to report, and as many to choose by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.source, parts = find_source(args.source).path, split(read_documents([args.text]))
    files = parts.write(args.scratch / "parts")
    if args.parts:
        return
    if not (args.scratch / "tokens").exists():
        prepare([str(files["train"])], args.scratch / "tokens", str(args.source), "text", QUIET)
    record = compared(args, parts)
    if args.results:
        args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def compared(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """What the results file has."""
    windows = spread(parts.report, args)
    documents = [str(window.document) for window in windows]
    source, rows = losses_of(args.source, windows), list[dict[str, Any]]()
    first: dict[str, Losses] = {}
    for name, folder in (start.split("=", 1) for start in args.starts):
        rate, tried = best_rate(args, name, folder, parts)
        for budget in ("0", *args.budgets):
            made = Path(folder) if budget == "0" else trained(args, name, folder, budget, rate)
            losses = losses_of(made, windows)
            row = {"start": name, "tokens": parse_count(budget, "--budgets") if budget != "0" else 0, "learning_rate": rate}
            row |= {
                "numbers": numbers(made),
                "loss": asdict(losses.per_token()),
                "over_source": over(losses, source, documents),
            }
            if len(rows) > len(args.budgets):  # of another start than the first
                row["over_first_start"] = over(losses, first[budget], documents)
            else:
                first[budget] = losses
            rows.append(row | {"rates_tried": tried})
            print(json.dumps(rows[-1]), flush=True)
    kept = ("budgets", "stages", "learning_rates", "batch_tokens", "length", "seed")
    return {
        "settings": {name: value for name, value in vars(args).items() if name in kept},
        "text": parts.record() | {"windows": windows_record(windows, args.length)},
        "source": asdict(source.per_token()),
        "rows": rows,
        "environment": environment(),
    }


def spread(part: list[Any], args: argparse.Namespace) -> list[Window]:
    return full_windows(part, str(args.source), args.length, args.windows)


def losses_of(folder: Path, windows: list[Window]) -> Losses:
    return measure(folder, {len(windows[0].ids): windows})[len(windows[0].ids)]


def best_rate(args: argparse.Namespace, name: str, folder: str, parts: Parts) -> tuple[float | None, dict[str, float]]:
    """The learning rate that ends lowest on the part to choose by, and how all ended; of one alone nothing is measured."""
    if len(args.learning_rates) == 1:
        return args.learning_rates[0], {}
    windows = spread(parts.choose, args)
    ends = {
        rate: losses_of(trained(args, name, folder, args.budgets[-1], rate), windows).per_token().mean
        for rate in args.learning_rates
    }
    best = min(ends, key=lambda rate: ends[rate])
    if best in (min(ends), max(ends)):
        print(f"{name}: {best:g} is an edge of the rates that were tried", flush=True)
    return best, {f"{rate:g}": end for rate, end in ends.items()}


def trained(args: argparse.Namespace, name: str, folder: str, budget: str, rate: float | None) -> Path:
    """The folder of a run, made where it is not there."""
    out: Path = args.scratch / f"{name}-{budget}-{rate or 'auto'}-{args.seed}"
    if not out.exists():
        settings = {"tokens": budget, "stages": args.stages, "length": args.length, "batch_tokens": args.batch_tokens}
        settings |= {"seed": args.seed, "holdout": 0, "dtype": "float32", "learning_rate": rate}
        uptrain(folder, str(args.scratch / "tokens"), out, resolve(None, settings), True, False, QUIET)
    return out


if __name__ == "__main__":
    main()
