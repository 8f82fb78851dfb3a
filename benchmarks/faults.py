"""`upfit uptrain` broken at random moments, and gone on with: is the end the same, byte for byte, and is nothing else left?

    unshare -rm python -m benchmarks.faults SCRATCH [--times 50] --results RESULTS.json

Kinds in turn: SIGKILL, SIGTERM, USR1, a disk that is full (a tmpfs, hence `unshare`; to the end of the run or for a while), and
SIGKILL with a file of the newest checkpoint cut short; about half of the runs write checkpoints beside training. The model is
the tests' tiny Llama with half of its key/value heads, and what it was as its teacher: what is tried is the order in which
files appear, not their size. After each fault the same command with --resume has to go on from the newest whole checkpoint to
the same weights and the same metrics.jsonl (times aside) as the run that nothing befell. Ends at the first that does not. The
results are written anew after each fault.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.uptraining import make_workshop, metrics
from tests.warm_python import warm_python
from upfit.environment import environment
from upfit.uptrain.run.state import STEP_NAME, STOPPED, Workspace

ROOT = Path(__file__).parent.parent
KINDS = ("killed", "terminated", "usr1", "disk full", "torn")
SIGNALS = {"killed": signal.SIGKILL, "torn": signal.SIGKILL, "terminated": signal.SIGTERM, "usr1": signal.SIGUSR1}
SAVE_EVERY, STEPS, ROWS, LENGTH = 2, 16, 4, 32
DISK, MOST_LEFT = 96 * 2**20, 2**20  # bytes of the tmpfs; left free, at most, when it is filled
TIMED = {"tokens_per_second", "seconds"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Bench:
    """A model, its data, and what a run gives that nothing befell; `seconds` and `step` are how long it and a step took."""

    def __init__(self, python: str, scratch: Path) -> None:
        self.python, self.scratch = python, scratch
        self.disk = scratch / "disk"
        self.shop = make_workshop(scratch)
        self.whole, began = scratch / "whole", time.monotonic()
        self.run(*self.words(self.whole))
        self.seconds = time.monotonic() - began
        self.step = statistics.median(1 / line["tokens_per_second"] for line in metrics(self.whole)) * ROWS * LENGTH

    def words(self, out: Path, resume: bool = False, background: bool = True) -> list[Any]:
        settings = {"length": LENGTH, "batch-tokens": ROWS * LENGTH, "tokens": STEPS * ROWS * LENGTH, "save-every": SAVE_EVERY}
        flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
        config = self.whole.with_name(f"{out.name}.toml")  # not on the disk that is filled
        config.write_text(f"holdout = 4\nasync_save = {str(background).lower()}\n", encoding="utf-8")
        return [
            "uptrain",
            self.shop.student,
            self.shop.data,
            out,
            *flags,
            "--config",
            config,
            *["--resume"] * resume,
        ]

    def run(self, *words: Any) -> str:
        """stderr of a command that must end well."""
        done = subprocess.run([self.python, "-m", "upfit", *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr

    def same(self, out: Path) -> bool:
        names = ("model.safetensors", "config.json")
        equal = all((out / name).read_bytes() == (self.whole / name).read_bytes() for name in names)
        return equal and untimed(out) == untimed(self.whole)


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in metrics(folder)]


def lines_in(out: Path) -> int:
    path = Workspace(out).path / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    scratch = args.scratch / "faults"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "disk").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(scratch / "disk")], check=True)
    draw, faults, too_late = random.Random(args.seed), list[dict[str, Any]](), 0
    with warm_python(ENVIRONMENT) as python:
        bench = Bench(python, scratch)
        while len(faults) < args.times:
            told = befall(bench, KINDS[len(faults) % len(KINDS)], draw)
            if told is None:
                too_late += 1
                continue
            faults.append(told)
            print(json.dumps(told), file=sys.stderr, flush=True)
            args.results.write_text(json.dumps(results(bench, faults, too_late), indent=1) + "\n", encoding="utf-8")


def results(bench: Bench, faults: list[dict[str, Any]], too_late: int) -> dict[str, Any]:
    return {
        "faults": len(faults),
        "ended_with_the_same_bytes": sum(fault["same_bytes"] for fault in faults),
        "kinds": {kind: summary([fault for fault in faults if fault["kind"] == kind]) for kind in KINDS},
        "runs_that_had_ended_before_their_fault": too_late,
        "seconds_of_a_run": round(bench.seconds, 1),
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "each": faults,
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }


def summary(faults: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "times": len(faults),
        "same_bytes": sum(fault["same_bytes"] for fault in faults),
        "in_the_middle_of_a_save": sum(fault["half_written"] for fault in faults),
        "before_the_first_checkpoint": sum(fault["newest"] is None for fault in faults),
        "most_steps_lost": {
            name: max((fault["lost"] for fault in faults if fault["background"] == beside), default=0)
            for name, beside in (("saved beside training", True), ("async_save = false", False))
        },
        "codes": dict(Counter(str(fault["code"]) for fault in faults)),
    }


def befall(bench: Bench, kind: str, draw: random.Random) -> dict[str, Any] | None:
    """Start a run, break it, look at what it left, and go on with it; None when it had ended before it could be broken."""
    place = bench.disk if kind == "disk full" else bench.scratch
    out = place / "out"
    for path in place.glob("out*"):
        shutil.rmtree(path)
    with open(bench.scratch / "stderr", "w+", encoding="utf-8") as stderr:
        background = draw.random() < 0.5
        words = [bench.python, "-m", "upfit", *map(str, bench.words(out, background=background))]
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr)
        moment = draw.uniform(0, STEPS + 2)  # in steps; the last two for what comes after them
        while process.poll() is None and lines_in(out) < int(min(moment, STEPS)):
            time.sleep(0.002)
        time.sleep(max(moment - STEPS, moment % 1) * bench.step)
        if process.poll() is not None or out.exists():
            process.wait()
            return None
        if kind == "disk full":
            fill_the_disk(bench, process, draw)
        else:
            process.send_signal(SIGNALS[kind])
        code = process.wait()
        stderr.seek(0)
        said = stderr.read()
    if kind == "torn" and not tear(out, draw):
        return None
    return look(bench, kind, out, code, said, background)


def fill_the_disk(bench: Bench, process: subprocess.Popen[bytes], draw: random.Random) -> None:
    """Leave less than a MB, until the process has ended or, in half of the cases, for up to half of the steps."""
    ballast = bench.disk / "ballast"
    left, filled = draw.randrange(MOST_LEFT), False
    while not filled:
        with open(ballast, "wb") as file, contextlib.suppress(OSError):  # the run may have written meanwhile
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(bench.disk).free - left))
            filled = True
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(draw.uniform(1, STEPS / 2) * bench.step if draw.random() < 0.5 else None)
    ballast.unlink()


def tear(out: Path, draw: random.Random) -> bool:
    """Cut a file of the newest checkpoint short, as a file system may after a power cut; False where there is none."""
    newest = Workspace(out).newest() if Workspace(out).path.exists() else None
    if newest is None:
        return False
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    os.truncate(path, draw.randrange(path.stat().st_size))
    return True


def look(bench: Bench, kind: str, out: Path, code: int, said: str, background: bool) -> dict[str, Any]:
    """What the fault left, checked; and the end of the run that goes on from it."""
    workspace = Workspace(out)
    there = workspace.path.exists()
    folders = {path.name for path in workspace.path.iterdir() if STEP_NAME.fullmatch(path.name)} if there else set()
    whole = sorted(path.name for path in workspace.checkpoints()) if there else []
    half = any(path.name.endswith((".tmp", ".old")) for path in workspace.path.iterdir()) if there else False
    assert len(folders) - len(whole) == (kind == "torn"), "a checkpoint looks whole and is not"
    lines = lines_in(out)
    done = int(whole[-1][5:]) if whole else 0
    finished = out.exists()
    assert not finished or bench.same(out), "OUT looks whole and is not"
    stopped = there and (workspace.path / STOPPED).exists()
    assert not stopped or (done == lines and code == 0), "a clean stop saves every step"
    if kind in ("killed", "terminated", "usr1") and not finished:
        # What is written beside training takes a while, but no longer than until the next one is due.
        assert lines - done <= SAVE_EVERY * (1 + background), "more is lost than the steps since the last checkpoint"
    if kind == "disk full":
        assert "Traceback" not in said and (code == 0) == finished, said[-2000:]
        told = [line for line in said.splitlines() if line.startswith("upfit: ")]  # libraries may add lines at their end
        assert len(told) == (code != 0), said[-2000:]
    if not finished:
        resumed = bench.run(*bench.words(out, resume=True))
        assert (f"going on from step {done} of" if done else "starting anew") in resumed, resumed[-2000:]
    same = bench.same(out)
    left = [path.name for path in out.parent.iterdir() if path.name.strip(".").startswith("out") and path != out]
    assert same and not left, f"bytes equal: {same}; left behind: {left}"
    newest = done or None
    return {"kind": kind, "code": code, "steps_done": lines, "newest": newest, "lost": max(0, lines - done) * (not finished),
            "half_written": half, "background": background, "stopped_cleanly": stopped, "finished_itself": finished,
            "same_bytes": same}  # fmt: skip


if __name__ == "__main__":
    main()
