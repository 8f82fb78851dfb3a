"""What each way of merging heads costs the small models of `small_models.py`, before any training.

    python -m benchmarks.small_merges FOLDER/qwen3 SCRATCH --calibration TEXT --results benchmarks/results/NAME.json

A row for each number of key/value heads and method: the loss over the source in nats a token, paired, with intervals over
documents. Decoders are measured on 48 windows of 512 tokens, encoder-decoders on 200 examples of their own task, all of
Upfit's own evaluation text; TEXT, by which they are calibrated, must be other text: what the two share is counted.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.parts import read_documents, shared_runs
from upfit.architecture.loading import load_strictly
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.environment import environment
from upfit.evaluate.encoder_decoder.losses import example_losses
from upfit.evaluate.intervals import difference_interval
from upfit.evaluate.loss import Losses, window_losses
from upfit.examples.model_inputs import padding_of
from upfit.examples.read import read_examples
from upfit.output import Output
from upfit.text import python_documents
from upfit.text.tokenizer import load_tokenizer
from upfit.text.windows import make_windows

METHODS: dict[str, dict[str, Any]] = {
    "mean": {"method": "mean"},
    "closed form": {"method": "aligned", "refit": False},
    "refitted": {"method": "aligned"},
}
WINDOWS, LENGTH, EXAMPLES, BATCH = 48, 512, 200, 8
QUIET = Output(quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", default="64k")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    source, documents = measure(args.model, args.model, config)
    print(f"source {source.per_token().mean:.3f}", flush=True)
    rows = []
    for kv_heads in args.kv_heads:
        for name, options in METHODS.items():
            folder = args.scratch / f"{args.model.name}-{kv_heads}-{name.replace(' ', '-')}"
            if not folder.exists():
                text = {"calibration": [args.calibration], "calibration_tokens": args.calibration_tokens}
                chosen = {"kv_heads": kv_heads, **options, **({} if name == "mean" else text)}
                recipe = get_recipe("gqa")
                convert(recipe, str(args.model), folder, recipe.options(**chosen), Settings(verify=False), QUIET)
            losses, _ = measure(folder, args.model, config)
            rows.append({"kv_heads": kv_heads, "method": name, "over_source": over(losses, source, documents)})
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "model": json.loads((args.model / "training.json").read_text(encoding="utf-8")) | {"class": config["architectures"][0]},
        "source": asdict(source.per_token()),
        "documents": len(set(documents)),
        "scored_tokens": int(source.tokens.sum()),
        "calibration_tokens": args.calibration_tokens,
        "shared_with_calibration": shared_runs(python_documents(), read_documents([args.calibration])),
        "rows": rows,
        "environment": environment(),
    }
    if args.results:
        args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, source: Path, config: dict[str, Any]) -> tuple[Losses, list[str]]:
    """The losses of the model in `folder`, and the document of each: made with the tokenizer of `source`."""
    model: Any = load_strictly(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(source))
    if not config.get("is_encoder_decoder"):
        windows = make_windows(python_documents(), tokenizer, LENGTH, WINDOWS)
        with QUIET.progress("", len(windows)) as meter:
            return window_losses(model, windows, BATCH, str(folder), meter), [str(window.document) for window in windows]
    examples = read_examples(source, config, None, "text", "text", EXAMPLES, QUIET, python_documents).examples
    with QUIET.progress("", len(examples)) as meter:
        losses = example_losses(model, examples, tokenizer, padding_of(config), BATCH, str(folder), meter)
    return losses, [example.document for example in examples]


def over(losses: Losses, source: Losses, documents: list[str]) -> dict[str, Any]:
    """The difference in nats a token, with an interval over documents."""
    places = np.unique(documents, return_inverse=True)[1]
    mine, theirs, tokens = (np.bincount(places, part.sum(1)) for part in (losses.nats, source.nats, source.tokens))
    return difference_interval(mine, tokens, theirs, tokens).record()


if __name__ == "__main__":
    main()
