"""Kills a conversion at random moments, and looks at what is left and whether the next run ends as if nothing had been.

    python benchmarks/convert_kills.py SCRATCH --kills 200 --results benchmarks/results/NAME.json

The embedded model in shards of 200 kB is converted in a forked process, which gets SIGKILL after a random share of the time
that an unbroken run takes. Whatever stands at OUT then must be whole: bytes equal to an unbroken run's. One to four kills
follow each other, so that runs are killed while they go on from an earlier kill; then the same conversion runs to its end,
and its bytes are compared.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.environment import environment
from upfit.output import Output

MODEL = Path(__file__).parent.parent / "upfit" / "demo" / "model"
MOST_IN_A_ROW = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.scratch, ignore_errors=True)
    source, out = args.scratch / "source", args.scratch / "out"
    AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(source, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(source)
    run(source, out)  # once for what is loaded on first use
    shutil.rmtree(out)
    began = time.monotonic()
    run(source, out)
    whole, seconds = contents(out), time.monotonic() - began
    before = contents(source)
    shutil.rmtree(out)
    draw, seen, kills = random.Random(args.seed), Counter[str](), 0
    while kills < args.kills:
        for _ in range(draw.randint(1, MOST_IN_A_ROW)):
            kills += 1
            seen[killed(source, out, draw.uniform(0, 1.1) * seconds, whole)] += 1
            if out.exists():
                break
        else:
            run(source, out)
            check(out, whole)
        shutil.rmtree(out)
    assert contents(source) == before, "the source was touched"
    told: dict[str, Any] = {
        "kills": kills,
        "seconds_unbroken": round(seconds, 3),
        "shards": len(list(source.glob("*.safetensors"))),
    }
    told |= {"after_the_kill": dict(seen.most_common()), "ended_with_other_bytes": 0, "environment": environment()}
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told["after_the_kill"]))


def run(source: Path, out: Path) -> None:
    recipe = get_recipe("gqa")
    convert(recipe, str(source), out, recipe.options(kv_heads=2, method="mean"), Settings(), Output(quiet=True))


def killed(source: Path, out: Path, after: float, whole: dict[str, str]) -> str:
    """Start a conversion, kill it `after` seconds, check what stands, and say what it was."""
    child = os.fork()
    if child == 0:
        try:
            run(source, out)
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if out.exists():
        check(out, whole)
        return "finished"
    partial = out.with_name(out.name + ".upfit-work")
    if not partial.exists():
        return "nothing written yet"
    journal = partial / "result" / "conversion.jsonl"
    finished = max(0, len(journal.read_text(encoding="utf-8").splitlines()) - 1) if journal.exists() else 0
    return "begun, no shard finished" if finished == 0 else "some or all shards finished"


def check(out: Path, whole: dict[str, str]) -> None:
    found = contents(out)
    different = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    assert not different, f"{out} has other bytes in {', '.join(different)}"


def contents(folder: Path) -> dict[str, str]:
    """Names and hashes of all files; of `recipe.json` without what depends on the day."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "recipe.json":
                steps = json.loads(data)["steps"]
                data = json.dumps([{k: v for k, v in step.items() if k != "date"} for step in steps]).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


if __name__ == "__main__":
    main()
