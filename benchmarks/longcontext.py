"""Synthetic long contexts: are they even, unambiguous and fast to make?

    python benchmarks/longcontext.py TEXT... --tokenizer MODEL --scratch DIR --items 20000 --results benchmarks/results/N.json

Makes the items twice: in one process, and in three shards of which one is killed and gone on with; tells whether the bytes are
the same. Then looks at every context as text for keys that stand where they must not, at histograms of lengths and depths
(chi-square against even ones), and at how many tokens a second two processes put together.
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from upfit.environment import environment
from upfit.longcontext.contexts import Contexts
from upfit.longcontext.wording import Wording
from upfit.text.tokenizer import load_tokenizer

BINS = 16
PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--min-tokens", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    whole, split = args.scratch / "whole", args.scratch / "split"
    began = time.monotonic()
    if not whole.exists():
        _synth(args, whole, "0/1")
    seconds = time.monotonic() - began
    if not split.exists():
        _killed(args, split)
        for shard in ("1/3", "0/3", "2/3"):
            _synth(args, split, shard)
    told = {"same_bytes": _same(whole, split), "seconds": seconds, **_looked_at(args, whole), "speed": _speed(args, whole)}
    told |= {"items_wanted": args.items, "range": [args.min_tokens, args.max_tokens], "environment": environment()}
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in told.items() if key != "environment"}, indent=1))


def _command(args: argparse.Namespace, out: Path, shard: str) -> list[str]:
    settings = {"--tokenizer": args.tokenizer, "--items": args.items, "--shard": shard}
    settings |= {"--min-tokens": args.min_tokens, "--max-tokens": args.max_tokens}
    return [sys.executable, "-m", "upfit", "synth", *args.texts, str(out), "-q", *(str(w) for s in settings.items() for w in s)]


def _synth(args: argparse.Namespace, out: Path, shard: str) -> None:
    subprocess.run(_command(args, out, shard), check=True)


def _killed(args: argparse.Namespace, out: Path) -> None:
    """Shard 1 of 3, killed when it has written something."""
    process = subprocess.Popen(_command(args, out, "1/3"))
    part = out.with_name(out.name + ".upfit-work") / "part-1-of-3.jsonl"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 100_000):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _same(first: Path, second: Path) -> bool:
    names = ["items.jsonl", "contexts.jsonl", *(f"segments/{path.name}" for path in (first / "segments").iterdir())]
    return all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


def _open(args: argparse.Namespace, folder: Path) -> Contexts:
    return Contexts(folder, Wording(load_tokenizer(args.tokenizer), "plain"))


def _looked_at(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    contexts = _open(args, folder)
    ambiguous, lengths, depths = 0, [], []
    for index in range(len(contexts)):
        item, recipe = contexts.item(index), contexts.plan(index)
        context = contexts.composer.context(item, recipe)
        own = {*item.pieces, *item.decoys}
        texts = [contexts.composer.segments.raw(part) for part in context.parts if isinstance(part, int) and part not in own]
        ambiguous += any(key.encode() in text for text in texts for key in item.keys)
        if recipe.tokens:
            lengths.append((len(contexts[index][0]) - args.min_tokens) / (args.max_tokens - args.min_tokens))
            depths += [place / len(context.parts) for place in context.places]
    return {
        "items": len(contexts),
        "families": contexts.settings["families"],
        "rejected": contexts.settings["rejected"],
        "segments": {key: value for key, value in contexts.composer.segments.about.items() if key != "texts"},
        "ambiguous": ambiguous,
        "recipe_bytes": (folder / "contexts.jsonl").stat().st_size / len(contexts),
        "lengths": _even(lengths),
        "depths": _even(depths),
    }


def _even(values: list[float]) -> dict[str, Any]:
    counts, _ = np.histogram(np.clip(values, 0, 1 - 1e-9), bins=BINS, range=(0, 1))
    return {"counts": counts.tolist(), "chi_square_p": float(stats.chisquare(counts).pvalue)}


def _made(args: argparse.Namespace, folder: Path, part: int, answers: Any, start: Any) -> None:
    contexts = _open(args, folder)
    start.wait()
    began = time.perf_counter()
    tokens = sum(len(contexts[index][0]) for index in range(part, min(len(contexts), 4000), PROCESSES))
    answers.put((tokens, time.perf_counter() - began))


def _speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second of two processes that begin at the same time."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spawn = multiprocessing.get_context("spawn")
    answers, start = spawn.Queue(), spawn.Barrier(PROCESSES)
    workers = [spawn.Process(target=_made, args=(args, folder, part, answers, start)) for part in range(PROCESSES)]
    for worker in workers:
        worker.start()
    found = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {"processes": PROCESSES, "tokens": sum(t for t, _ in found), "tokens_per_second": sum(t / s for t, s in found)}


if __name__ == "__main__":
    main()
