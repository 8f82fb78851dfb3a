"""What starting costs: CPU seconds of commands that answer at once, and the imports they spend them on.

    python benchmarks/start_up.py before=../upfit-before after=. > RESULTS.json

Each argument names a tree of Upfit. Seconds are CPU time of user and system, the least of several runs, since other work beside
makes all of them larger; imports are those of one run under `-X importtime`, which makes them slower, by package.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from upfit.environment import environment

RUNS = 3
MODEL = "upfit/demo/model"
COMMANDS = {
    "help": ["--help"],
    "show of a bad path": ["show", "./nope"],
    "convert with a bad method": ["convert", "gqa", MODEL, "out", "--kv-heads", "2", "--method", "typo"],
    "convert into a folder that is taken": ["convert", "gqa", MODEL, "upfit", "--kv-heads", "2"],
    "evaluate of a bad path": ["evaluate", "./nope"],
    "show of the embedded model": ["show", MODEL],
}
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
LEAST = 10_000  # microseconds of a package that is told


def started(tree: str, words: list[str], *options: str) -> tuple[float, str]:
    """CPU seconds of `upfit WORDS` of this tree, and its stderr."""
    before = os.times()
    where = os.environ | {"PYTHONPATH": str(Path(tree).resolve()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *options, "-m", "upfit", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree, env=where)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system, done.stderr


def imports(told: str) -> dict[str, float]:
    """Seconds by package, of all that takes some."""
    counts: Counter[str] = Counter()
    for spent, name in LINE.findall(told):
        counts[name.split(".")[0]] += int(spent)
    return {name: round(spent / 1e6, 3) for name, spent in counts.most_common() if spent >= LEAST}


def measured(tree: str) -> dict[str, Any]:
    results = {}
    for name, words in COMMANDS.items():
        started(tree, words)  # so that the files are in memory
        seconds = min(started(tree, words)[0] for _ in range(RUNS))
        results[name] = {"cpu_seconds": round(seconds, 2), "imports": imports(started(tree, words, "-X", "importtime")[1])}
    return results


def main() -> None:
    trees = dict(argument.split("=", 1) for argument in sys.argv[1:])
    print(
        json.dumps(
            {"runs": RUNS, "environment": environment(), **{name: measured(tree) for name, tree in trees.items()}}, indent=1
        )
    )


if __name__ == "__main__":
    main()
