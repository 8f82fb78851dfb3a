"""Time and memory of giving a Llama-3-8B-shaped checkpoint (random bfloat16) a latent of 512 and 64 rotated numbers.

    nice -n 10 python -m benchmarks.latent_scale SCRATCH --layers 2 --tokens 8k [--no-refit] [--mlp 4096] --results FILE

The weights are random, so that only time and memory mean anything; the vocabulary is cut to 4,096, and `--layers` of the 32
layers are made. Seconds are CPU seconds of one process, by layer and step as `align_profile.py` has them; memory is the largest
RssAnon (anonymous pages) seen. What a dry run says of the same folder stands beside them, and the plan of a Llama-3-70B-shaped
checkpoint of sparse files, timed. `--mlp`: a narrower MLP, for a machine that cannot hold the sums of the real one's last
matrix. SCRATCH needs a gigabyte a layer.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.align_profile import Clock, install
from benchmarks.convert_scale import LLAMA_3_8B, LLAMA_3_70B, anonymous_bytes, make
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.demo import embedded_model
from upfit.environment import environment
from upfit.output import Output

WIDTHS = {"latent": 512, "rope_dim": 64}
VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", default="8k")
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--mlp", type=int, default=LLAMA_3_8B["intermediate_size"], help="width of the MLP")
    parser.add_argument("--plan-only", action="store_true", help="dry runs alone")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    source = source_of(args.scratch / f"llama-3-8b-{args.layers}-{args.mlp}", args.layers, args.mlp)
    record: dict[str, Any] = {"layers": args.layers, "tokens": args.tokens, "refit": not args.no_refit, "mlp": args.mlp}
    record |= WIDTHS | {"estimate": dry_run(source, args.tokens, not args.no_refit)}
    record["plan_of_70b"] = plan_of_70b(args.scratch, args.tokens)
    if not args.plan_only:
        record |= measured(source, args.scratch / "out", args.tokens, not args.no_refit)
    record |= {"load_average": os.getloadavg()[0], "environment": environment()}
    print(json.dumps(record, indent=1), flush=True)
    if args.results:
        args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def source_of(folder: Path, layers: int, mlp: int) -> Path:
    if not folder.exists():
        sizes = {**LLAMA_3_8B, "num_hidden_layers": layers, "intermediate_size": mlp, "vocab_size": VOCABULARY}
        make(folder, sizes, dtype="bfloat16")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(embedded_model() / name, folder / name)
    return folder


def measured(source: Path, out: Path, tokens: str, refit: bool) -> dict[str, Any]:
    """CPU seconds of the layers and of the whole, and the peak of anonymous memory."""
    clock, done, peak = Clock(), threading.Event(), [0]
    install(clock, None)

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], anonymous_bytes(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    shutil.rmtree(out, ignore_errors=True)
    recipe, began, wall = get_recipe("mla"), time.process_time(), time.monotonic()
    options = recipe.options(**WIDTHS, calibration_tokens=tokens, refit=refit)
    try:
        conversion = convert(recipe, str(source), out, options, Settings(verify=False), Output(quiet=True))
    finally:
        done.set()
        watcher.join()
        shutil.rmtree(out, ignore_errors=True)
    return {
        "seconds": time.process_time() - began,
        "seconds_by_the_clock": time.monotonic() - wall,
        "layer_seconds": [layer["whole"] for layer in clock.layers],
        "later_layer": clock.mean(clock.layers[1:]),
        "anonymous_gb": peak[0] / 1e9,
        "kv_bytes_per_token": conversion.kv_bytes_per_token,
    }


def dry_run(folder: Path, tokens: str, refit: bool) -> dict[str, Any]:
    """What it says of time and memory and of the result, and how long it took."""
    command = [sys.executable, "-m", "upfit", "convert", "mla", str(folder), str(folder.parent / "out"), "--dry-run", "--json"]
    command += ["--latent", str(WIDTHS["latent"]), "--rope-dim", str(WIDTHS["rope_dim"]), "--calibration-tokens", tokens]
    began = time.monotonic()
    done = subprocess.run([*command, *([] if refit else ["--no-refit"])], check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    parts = {name: answer[name] for name in ("estimate", "parameters", "kv_bytes_per_token")}
    return parts | {"seconds_by_the_clock": time.monotonic() - began}


def plan_of_70b(scratch: Path, tokens: str) -> dict[str, Any]:
    folder = scratch / "seventy"
    shutil.rmtree(folder, ignore_errors=True)
    make(folder, LLAMA_3_70B | {"vocab_size": 128256}, sparse=True, dtype="bfloat16")
    try:
        return dry_run(folder, tokens, True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
