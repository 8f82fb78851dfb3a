"""Which tests run a line, and a process that runs tests on changed checkouts: it imports what is heavy once, and forks."""

import ast
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COVERAGE, DURATIONS = "coverage.data", "durations.json"
LONGEST = 60.0  # seconds: a test that takes more says nothing in time
MOST = 120  # tests a change


def measure_coverage(
    root: Path, scratch: Path, tests: list[str], slow: list[str], workers: int
) -> tuple[Path, dict[str, float]]:
    """Which tests run which lines, and how long each takes: measured unless SCRATCH holds it for this very code.

    Those in the files `tests`; of all, where none are named, the slow ones in the paths `slow` alone.
    """
    data, durations = scratch / COVERAGE, scratch / DURATIONS
    state = " ".join([_state(root), *tests])
    if durations.exists() and (known := json.loads(durations.read_text()))["state"] == state:
        return data, known["seconds"]
    checkout, known = copy_checkout(root, scratch / "measured"), {"state": state, "seconds": {}}
    variables = dict(os.environ) | {"PYTHONPATH": str(checkout), "MUTANT_DURATIONS": str(durations)}
    words = ["-n", str(workers), "-p", "benchmarks.mutant_durations", "--cov=upfit", "--cov-context=test", "--cov-report="]
    for number, which in enumerate((["-m", "not slow", *tests], ["-m", "slow", *(tests or slow)])):
        variables["COVERAGE_FILE"] = f"{data}-{number}"
        with open(scratch / f"measured-{number}.log", "w") as log:
            subprocess.run(
                [sys.executable, "-m", "pytest", *words, *which], cwd=checkout, env=variables, stdout=log, stderr=log
            )
        known["seconds"] |= json.loads(durations.read_text())
    durations.write_text(json.dumps(known))
    return data, known["seconds"]


def _state(root: Path) -> str:
    words = (["rev-parse", "HEAD:upfit"], ["rev-parse", "HEAD:tests"])
    return " ".join(
        subprocess.run(["git", *w], cwd=root, capture_output=True, text=True, check=True).stdout.strip() for w in words
    )


def copy_checkout(root: Path, copy: Path) -> Path:
    """The tracked files of `root`, compiled, so that forks need not."""
    shutil.rmtree(copy, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy / name)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(copy / "upfit"), str(copy / "tests")], check=True)
    return copy


class Covering:
    """Which tests to run for a line."""

    def __init__(self, measured: tuple[Path, dict[str, float]]) -> None:
        from coverage import CoverageData

        path, self.seconds = measured
        self.data, self.lock = CoverageData(no_disk=True), threading.Lock()
        for part in sorted(path.parent.glob(f"{path.name}-*")):
            read = CoverageData(str(part))
            read.read()
            self.data.update(read)
        self.files = {name[name.rindex("/upfit/") + 1 :]: name for name in self.data.measured_files()}

    def tests(self, file: str, lines: Iterable[int], seconds: float) -> list[str]:
        """Those that run one of `lines` in a function; the room's own first.

        Where nobody is seen to, because not every line of a statement counts, those that run the function around it. A line
        outside of functions runs when some test is the first to import it, which says nothing about that test: then those
        that run any function of the file, for they use what it defines, or, where it has none, of its room.
        """
        lines, room = set(lines), str(Path(file).parent)
        functions = _functions(file)
        around = min((function for function in functions if lines.intersection(function)), key=len, default=range(0))
        choices = (lines.intersection(around), around, {line for function in functions for line in function})
        names = next((names for choice in choices if (names := self._running(file, choice))), set())
        if not names:
            beside = [other for other in self.files if str(Path(other).parent) == room]
            names = {name for other in beside for function in _functions(other) for name in self._running(other, function)}
        known = [name for name in names if self.seconds.get(name, LONGEST) < LONGEST]
        known.sort(key=lambda name: (not name.startswith(room), self.seconds[name]))
        chosen: list[str] = []
        for name in known[:MOST]:
            seconds -= self.seconds[name]
            if seconds < 0 and chosen:
                break
            chosen.append(name)
        return chosen

    def _running(self, file: str, lines: Iterable[int]) -> set[str]:
        with self.lock:
            by_line = self.data.contexts_by_lineno(self.files[file]) if file in self.files else {}
        return {_test(context) for line in lines for context in by_line.get(line, ())} - {""}


@functools.cache
def _functions(file: str) -> list[range]:
    """The lines of the body of each."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [range(node.body[0].lineno, (node.end_lineno or 0) + 1) for node in functions]


def _test(context: str) -> str:
    """The test of a coverage context, without the group that xdist adds and what it was doing."""
    return context.partition("|")[0].partition("@")[0]


class Runner:
    """A process that has imported what is heavy, and forks for each run of tests (used as a context manager, by threads)."""

    def __enter__(self) -> "Runner":
        variables = dict(os.environ) | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "TOKENIZERS_PARALLELISM": "false"}
        variables |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        self.lock, self.answers, self.arrived = threading.Lock(), dict[int, str](), threading.Condition()
        self.number = 0
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            with self.arrived:
                self.answers[answer["number"]] = answer["failed"]
                self.arrived.notify_all()

    def changed(self, checkout: Path, file: str, text: str, tests: list[str], seconds: float) -> str:
        """The test that failed (or `hangs`) with `text` in place of `file`; nothing if all passed. The file is put back."""
        path = checkout / file
        before = path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        try:
            return self.run(checkout, tests, seconds)
        finally:
            path.write_text(before, encoding="utf-8")
            for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                compiled.unlink()

    def run(self, checkout: Path, tests: list[str], seconds: float) -> str:
        assert self.process.stdin is not None
        with self.lock:
            self.number += 1
            number = self.number
            task = {"number": number, "checkout": str(checkout), "tests": tests, "seconds": seconds}
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        with self.arrived:
            self.arrived.wait_for(lambda: number in self.answers)
        return self.answers.pop(number)


def serve() -> None:
    """The process behind `Runner`: a task a line on stdin, an answer a line on stdout."""
    import accelerate  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    running: dict[int, tuple[int, float, Path]] = {}  # by process: task, when it hangs, where its answer stands
    os.set_blocking(0, False)
    text = ""
    while True:
        try:
            read = os.read(0, 1 << 20)
            if not read:
                return
            text += read.decode()
        except BlockingIOError:
            time.sleep(0.02)
        while "\n" in text:
            line, text = text.split("\n", 1)
            task = json.loads(line)
            answer = Path(task["checkout"], ".answer")
            answer.unlink(missing_ok=True)
            if (child := os.fork()) == 0:
                run_tests(Path(task["checkout"]), task["tests"], answer)
            running[child] = (task["number"], time.monotonic() + task["seconds"], answer)
        for child, (number, end, answer) in list(running.items()):
            ended = os.waitpid(child, os.WNOHANG)[0] == child
            if not ended and time.monotonic() < end:
                continue
            if not ended:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            failed = (answer.read_text() if answer.exists() else "it ends the process") if ended else "it hangs"
            print(json.dumps({"number": number, "failed": failed}), flush=True)
            del running[child]


def run_tests(checkout: Path, tests: list[str], answer: Path) -> None:
    """In a fork: run the tests in `checkout`, write to `answer` which one failed."""
    import pytest

    os.setsid()
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    os.environ["PYTHONPATH"] = str(checkout)
    sink = os.open(checkout / ".output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0), os.dup2(sink, 1), os.dup2(sink, 2)

    class First:
        failed = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.failed:
                self.failed = report.nodeid

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed and not self.failed:
                self.failed = f"{report.nodeid} cannot be imported"

    first = First()
    # What was imported before the fork is not rewritten, and pytest would take its own word on that for an error.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main(["-n", "0", "-x", "-p", "no:cacheprovider", *quiet, *tests], plugins=[first])
    answer.write_text(first.failed or ("" if status == 0 else f"pytest ends with {int(status)}"))
    os._exit(0)


if __name__ == "__main__":
    serve()
