"""What reading back costs: time of copying a checkpoint of random float16, of writing its conversion, and of comparing that.

    python benchmarks/convert_readback.py SCRATCH [--layers 24] [--rounds 5]

SCRATCH needs three times the checkpoint (2.7 GB with 24 layers). In each round `cp -r`, the writing and the comparing are timed
one after the other, the first two from a cold cache where the system allows it. The comparing lets go of what the system keeps
of the written files first, so it reads from the disk. Each way of moving bytes is measured by itself. Prints JSON: medians,
minima and maxima in seconds, and ratios of the medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert_scale import drop_caches, make

from upfit.checkpoint import copy_bytes
from upfit.convert import conversion
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Verification
from upfit.environment import environment
from upfit.output import Output

SIZES = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "vocab_size": 32000}
WAYS = ("direct", "kernel", "plain")  # reflinks are not read back


def clocked(name: str, times: dict[str, list[float]], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        began = time.monotonic()
        found = function(*arguments)
        times.setdefault(name, []).append(time.monotonic() - began)
        return found

    return run


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", source, out], check=True)
    os.sync()


def one_round(source: Path, out: Path, times: dict[str, list[float]]) -> bool:
    """Append to `times` what `cp` and a conversion by each way took; whether the cache was cold."""
    cold = drop_caches()
    clocked("cp -r", times, copy)(source, out)
    shutil.rmtree(out)
    write, compare, recipe = conversion.write_shards, conversion.check_written, get_recipe("gqa")
    for way in WAYS:
        drop_caches()
        copy_bytes.WAYS = (way, "plain")  # type: ignore[assignment]
        conversion.write_shards = clocked(f"{way}: written", times, write)
        conversion.check_written = clocked(f"{way}: read back", times, compare)
        convert(recipe, str(source), out, recipe.options(kv_heads=4, method="mean"), Settings(), Output(quiet=True))
        shutil.rmtree(out)
    conversion.write_shards, conversion.check_written = write, compare
    return cold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    source, times = args.scratch / "source", dict[str, list[float]]()
    if not source.exists():
        make(source, SIZES | {"num_hidden_layers": args.layers})
    conversion.verify = lambda *_: Verification("", "")  # logits are another matter
    cold = [one_round(source, args.scratch / "out", times) for _ in range(args.rounds)]
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {way: median[f"{way}: read back"] / median[f"{way}: written"] for way in WAYS}
    report = {
        "source_gb": sum(file.stat().st_size for file in source.iterdir()) / 1e9,
        "seconds": {n: {"median": median[n], "min": min(s), "max": max(s)} for n, s in times.items()},
        "read_back_to_written": ratios,
        "read_back_to_cp": {way: median[f"{way}: read back"] / median["cp -r"] for way in WAYS},
        "cold_cache": all(cold),
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }
    json.dump(report, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
