"""Loss of a model before conversion, after it, and after uptraining, on text held out from the uptraining; paired intervals.

    python -m benchmarks.recovery MODEL TEXT SCRATCH --kv-heads 1 --tokens 50k --results benchmarks/results/NAME.json

TEXT is a folder of files to train on. The loss is measured on Upfit's default text (the language reference and a fixed list of
standard-library files), which must not be in TEXT: what the two share all the same is counted, and stands in the results.
Nothing is chosen here. Steps whose folder stands in SCRATCH already are not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.parts import read_documents, shared_runs
from upfit import provenance
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.environment import environment
from upfit.evaluate.evaluate import evaluate
from upfit.evaluate.options import Options
from upfit.output import Output
from upfit.text import python_documents
from upfit.uptrain.config import resolve
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.train import uptrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--method", default="mean")
    parser.add_argument("--tokens", default="50k")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    output, recipe = Output(), get_recipe("gqa")
    shards, converted = args.scratch / "tokens", args.scratch / f"kv{args.kv_heads}-{args.method}"
    trained = converted.with_name(f"{converted.name}-{args.tokens}")
    if not shards.exists():
        prepare([str(args.text)], shards, args.model, "text", output)
    if not converted.exists():
        convert(recipe, args.model, converted, recipe.options(kv_heads=args.kv_heads, method=args.method), Settings(), output)
    if not trained.exists():
        config = resolve(None, {"tokens": args.tokens, "length": args.length, "holdout": 8})
        uptrain(str(converted), str(shards), trained, config, True, False, output)
    rows: dict[str, Any] = {}
    for name, folder in (("converted", converted), ("uptrained", trained)):
        options = Options(against=args.model, length=args.length, windows=args.windows)
        told = evaluate(str(folder), options, output).record()
        rows["source"] = _row(told["against"], None)
        rows[name] = _row(told["model"], told["difference"])
        rows["text"] = told["data"]
    rows["shared_with_train"] = shared_runs(python_documents(), read_documents([str(args.text)]))
    kept = ("verb", "options", "measurements", "versions")  # not where the folders lay
    rows["steps"] = [{key: step[key] for key in kept} for step in provenance.read(trained)]
    rows["environment"] = environment()
    args.results.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for name in ("source", "converted", "uptrained"):
        print(name, json.dumps(rows[name]))


def _row(subject: dict[str, Any], difference: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "loss": subject["loss"]["nats_per_token"],
        "difference": difference["nats_per_token"] if difference else None,
        "kv_bytes_per_token": subject["cache"]["bytes_per_token"],
    }


if __name__ == "__main__":
    main()
