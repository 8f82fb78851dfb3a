"""Is the memory that `upfit plan` tells the memory that `upfit uptrain` takes?

    python benchmarks/plan_memory.py SCRATCH --models MODEL... [--lengths 256 512] [--rows 2 4] --results RESULTS.json

Each model is uptrained for two steps in float32 on this CPU, by itself as teacher, and the largest anonymous memory (RssAnon)
of the process is told, less what it has before it loads a model, beside the plan's peak: once with glibc told to give back at
once what is freed, so that it is what tensors take, and once as it comes, with the memory that glibc keeps for later
(`with_kept`; a few tens of megabytes, which a large model does not notice).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from convert_scale import anonymous_bytes

from upfit.environment import environment
from upfit.output import Output
from upfit.plan.options import Options
from upfit.plan.plan import plan
from upfit.uptrain.data.prepare import prepare

TEXT = Path(json.__file__).parent.parent / "argparse.py"
IMPORTS = "import torch, transformers, accelerate, upfit.uptrain.train, time; time.sleep(2)"
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    before = [_peak([sys.executable, "-c", IMPORTS], added) for added in (AT_ONCE, {})]
    rows = []
    for model in args.models:
        data = args.scratch / f"tokens-{Path(model).name}"
        if not data.exists():
            prepare([str(TEXT)], data, model, "text", Output(quiet=True))
        for length in args.lengths:
            for micro in args.rows:
                rows.append(_row(args.scratch, model, data, length, micro, before))
                print(json.dumps(rows[-1]), flush=True)
    told = {"before_models": before, "rows": rows, "environment": environment()}
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _row(scratch: Path, model: str, data: Path, length: int, micro: int, before: list[int]) -> dict[str, Any]:
    out, step = scratch / "out", length * micro
    shutil.rmtree(out, ignore_errors=True)
    config = scratch / "config.toml"
    config.write_text(f"micro_batch = {micro}\nholdout = 0\n", encoding="utf-8")
    settings = ["--length", length, "--batch-tokens", step, "--tokens", 2 * step, "--config", config]
    words = [
        "-m",
        "upfit",
        "uptrain",
        model,
        data,
        out,
        "--teacher",
        model,
        "--dtype",
        "float32",
        "--overwrite",
        "-q",
        *settings,
    ]
    command = [sys.executable, *map(str, words)]
    measured, with_kept = (_peak(command, added) - own for added, own in zip((AT_ONCE, {}), before, strict=True))
    options = Options(tokens="1M", length=length, micro_batch=micro, dtype="float32", teacher="self")
    memory = plan(model, options).record()["memory"]
    name = Path(model).name
    return {"model": name, "length": length, "rows": micro, "measured": measured, "with_kept": with_kept,
            "planned": memory["peak"], "ratio": memory["peak"] / measured, "parts": memory}  # fmt: skip


def _peak(command: list[str], added: dict[str, str]) -> int:
    """The largest anonymous memory that `command` has while it runs, with `added` in its environment."""
    process = subprocess.Popen(command, env=os.environ | added)
    most = 0
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return most


if __name__ == "__main__":
    main()
