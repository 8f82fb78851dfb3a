"""How fast is text tokenised, with how much memory, and are the bytes the same for every number of workers?

    python benchmarks/prepare.py SCRATCH --tokenizer MODEL [--workers 1 2] [--copies 1 4] [--rounds 2] --results RESULTS.json

The text is the standard library of the running Python, so many times over. Each run is a process of its own; besides seconds
the CPU seconds of all its threads are told, as a busy machine changes only the former.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from upfit.environment import environment
from upfit.output import Output
from upfit.provenance import FILE
from upfit.text import library_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.results is None:  # one run, told as JSON
        print(json.dumps(_run(args.scratch, args.tokenizer, args.workers[0])))
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in library_documents() if document.kind == "code"]
    rows = []
    for copies in args.copies:
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (args.scratch / "text.jsonl").write_text("".join(lines * copies))
        for workers in args.workers * args.rounds:
            command = [sys.executable, __file__, str(args.scratch), "--tokenizer", args.tokenizer, "--workers", str(workers)]
            load = os.getloadavg()[0]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"copies": copies, **told, "load_before": round(load, 1)})
            print(json.dumps(rows[-1]), flush=True)
    same = all(len({row["sha256"] for row in rows if row["copies"] == copies}) == 1 for copies in args.copies)
    result = {"tokenizer": Path(args.tokenizer).name, "same_bytes": same, "rows": rows, "environment": environment()}
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _run(scratch: Path, tokenizer: str, workers: int) -> dict[str, Any]:
    from upfit.text.tokenizer import load_tokenizer
    from upfit.uptrain.data.prepare import prepare

    load_tokenizer(tokenizer)  # imports transformers
    before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, out = time.monotonic(), scratch / "out"
    manifest = prepare([str(scratch / "text.jsonl")], out, tokenizer, "text", Output(quiet=True), True, workers=workers)
    seconds, cpu = time.monotonic() - start, time.process_time() - before
    digest = hashlib.sha256()
    for path in sorted(out.iterdir()):
        digest.update(b"" if path.name == FILE else path.read_bytes())
    return {
        "workers": workers,
        "tokens": manifest.tokens,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "tokens_per_second": round(manifest.tokens / seconds),
        "tokens_per_cpu_second": round(manifest.tokens / cpu),
        "added_memory_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024,
        "sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    main()
