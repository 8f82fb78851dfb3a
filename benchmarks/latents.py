"""What a latent costs a model beside aligned heads that take the same cache, before any training.

    python -m benchmarks.latents MODEL SCRATCH --shares 50 25 12.5 --calibration TEXT --results benchmarks/results/NAME.json

A row for each share of the source's cache and way: `heads` (aligned merging, where a number of heads has that share), `stock`
(a DeepseekV3ForCausalLM) and `own` (several rotated keys a pair). Each tells the numbers that a token really adds to a layer's
cache, and the loss over the source in nats a token, paired, with intervals over documents, on windows of Upfit's own evaluation
text; TEXT, on which everything is fitted and chosen, must be other text: what the two share is counted. Conversions whose
folder stands in SCRATCH already are not done again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts import read_documents, shared_runs, windows_record
from benchmarks.small_merges import QUIET, over
from upfit.architecture.loading import load_strictly
from upfit.checkpoint.source import find_source
from upfit.convert.conversion import Settings, convert
from upfit.convert.describe import describe
from upfit.convert.recipe import get_recipe
from upfit.environment import environment
from upfit.errors import UpfitError
from upfit.evaluate.loss import Losses, window_losses
from upfit.text import python_documents
from upfit.text.tokenizer import load_tokenizer
from upfit.text.windows import Window, make_windows

TOKENS, BATCH = 24_576, 4  # tokens that are scored at each length
WAYS = ("heads", "stock", "own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[50, 25], help="of the source's cache, in percent")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", default="32k")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    source, tokenizer = find_source(args.model).path, load_tokenizer(args.model)
    windows = {n: make_windows(python_documents(), tokenizer, n, TOKENS // n) for n in args.lengths}
    before, rows = measure(source, windows), list[dict[str, Any]]()
    print("source", {n: round(losses.per_token().mean, 4) for n, losses in before.items()}, flush=True)
    for share in args.shares:
        for way in args.ways:
            folder = args.scratch / f"{share:g}-{way}"
            if not folder.exists() and not make(source, folder, share, way, args):
                continue
            after = measure(folder, windows)
            rows.append({"share": share, "way": way, "numbers": numbers(folder), **sizes(folder)})
            rows[-1] |= {
                "over_source": {str(n): over(after[n], before[n], [str(w.document) for w in windows[n]]) for n in windows}
            }
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "source": {str(n): asdict(losses.per_token()) for n, losses in before.items()},
        "source_numbers": numbers(source),
        "calibration_tokens": args.calibration_tokens,
        "text": {str(n): windows_record(part, n) for n, part in windows.items()},
        "shared_with_calibration": shared_runs(python_documents(), read_documents([args.calibration])),
        "rows": rows,
        "environment": environment(),
    }
    if args.results:
        args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def make(source: Path, folder: Path, share: float, way: str, args: argparse.Namespace) -> bool:
    """Convert; False where there is no such conversion."""
    text = {"calibration": [args.calibration], "calibration_tokens": args.calibration_tokens}
    recipe, options = get_recipe("mla"), dict[str, Any](cache=f"{share:g}%")
    if way == "heads":
        heads = describe(str(source)).kv_heads[0] * share / 100
        if heads < 1 or heads != int(heads):
            return False
        recipe, options = get_recipe("gqa"), {"kv_heads": int(heads), "method": "aligned"}
    else:
        options["target"] = "deepseek_v3" if way == "stock" else "upfit_mla"
    try:
        convert(recipe, str(source), folder, recipe.options(**options, **text), Settings(verify=False), QUIET)
    except UpfitError as error:
        print(f"{share:g} % {way}: {error}", flush=True)
        return False
    return True


def measure(folder: Path, windows: dict[int, list[Window]]) -> dict[int, Losses]:
    model: Any = load_strictly(folder, dtype=torch.float32).eval()
    losses = {}
    for length, part in windows.items():
        with QUIET.progress("", len(part)) as meter:
            losses[length] = window_losses(model, part, max(1, BATCH * 512 // length), str(folder), meter)
    return losses


def numbers(folder: Path) -> float:
    """What a token adds to the cache of a layer."""
    facts = describe(str(folder))
    return facts.kv_bytes_per_token / facts.layers / {"F32": 4}.get(facts.dtypes[0], 2)


def sizes(folder: Path) -> dict[str, Any]:
    """How a latent's cache is spent, as its history tells."""
    widths = describe(str(folder)).history[-1]["measurements"].get("sizes")
    return {} if widths is None else {"latent": widths["latent"], "rotated": 2 * sum(widths["counts"])}


if __name__ == "__main__":
    main()
