"""Attacks on the promise that no verb changes or removes what it did not make, and that every OUT is whole or absent.

    python -m benchmarks.collisions SCRATCH [--rounds 3] [--only KIND] [--results RESULTS.json]

Each collision is one run of a verb (convert with and without a fit, prepare, synth, calibrate, uptrain, report) in a folder
prepared against it: names that the verb might want taken by the user's files, folders, links; SRC and OUT as one folder under
two names (links, bind mounts); OUT that appears while the verb runs; two verbs at one OUT; sources rewritten while they are
read; kills. Afterwards all that was the user's must be there with its bytes, and OUT must be absent, the user's, or what an
undisturbed run writes. Runs in a private mount namespace (Linux, root or unprivileged user namespaces); `--rounds` is how often
races and kills are tried.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.folders import save_tiny, tiny_llama
from tests.uptraining import text

WORK = ".upfit-work"
ENDINGS = (
    WORK,
    ".partial",
    ".fit",
    ".stream",
    ".replaced",
    ".prepare",
    ".synth",
    ".uptrain",
    ".track",
    ".lock",
    ".tmp",
    ".old",
)
MINE = b"mine, and nobody else's\n"
PATIENCE = 120.0


@dataclass(frozen=True)
class Verb:
    """`words(place, out)` is a command in a folder with the inputs; `source` the input that could stand for another."""

    name: str
    source: str
    words: Callable[[Path, Path], list[str]]
    overwrites: bool = True
    suffix: str = ""


SMALL = ["--tokens", "512", "--length", "32", "--batch-tokens", "128", "--stages", "lm", "--dtype", "float32"]
CALIBRATION = ["--calibration-tokens", "1k", "--calibration-length", "64"]
VERBS = (
    Verb("convert", "m", lambda p, o: ["convert", "gqa", str(p / "m"), str(o), "--kv-heads", "2", "--method", "mean"]),
    Verb(
        "convert aligned", "m",
        lambda p, o: ["convert", "gqa", str(p / "m"), str(o), "--kv-heads", "2", "--calibration", str(p / "stats.safetensors")],
    ),
    Verb("prepare", "t", lambda p, o: ["prepare", str(p / "t"), str(o), "--tokenizer", str(p / "m")]),
    Verb(
        "synth", "t",
        lambda p, o: ["synth", str(p / "t"), str(o), "--tokenizer", str(p / "m"), "--items", "4", "--min-tokens", "300",
                      "--max-tokens", "900"],
        overwrites=False,
    ),
    Verb(
        "calibrate", "m",
        lambda p, o: ["calibrate", str(p / "m"), str(p / "t"), str(o), *CALIBRATION],
        suffix=".safetensors",
    ),
    Verb("uptrain", "g", lambda p, o: ["uptrain", str(p / "g"), str(p / "tok"), str(o), *SMALL]),
    Verb("report", "g", lambda p, o: ["report", str(p / "g"), str(o)], suffix=".html"),
)  # fmt: skip


def child(words: list[str], cwd: Path) -> int:
    """The command in a process of its own (a fork: what is imported stays so); its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(cwd)
        with open(cwd / ".." / "log", "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["upfit", *words]
        from upfit.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("a command did not end in time")


def run(words: list[str], cwd: Path) -> int:
    return wait(child(words, cwd))


def contents(path: Path) -> dict[str, str]:
    """Hashes and link targets of everything at `path`, by name; of recipe.json what does not depend on the day."""
    if path.is_symlink():
        return {"": "-> " + os.readlink(path)}
    if path.is_file():
        return {"": digest(path)}
    found = {}
    for root, folders, files in os.walk(path):
        for name in (*files, *folders):
            at = Path(root, name)
            known = "-> " + os.readlink(at) if at.is_symlink() else digest(at) if at.is_file() else "folder"
            found[str(at.relative_to(path))] = known
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def whole(path: Path) -> dict[str, str]:
    """What of an output must be the same whenever and wherever it is made."""
    if path.suffix == ".html" and path.is_file():  # it holds the model's name
        return {"": "a whole page" if path.read_text(encoding="utf-8").rstrip().endswith("</html>") else "torn"}
    loose = ("recipe.json", "metrics.jsonl", "uptrain.toml", "settings.json", "manifest.json", "about.json")
    return {name: value for name, value in contents(path).items() if Path(name).name not in loose}


class Place:
    """A fresh folder with the inputs, the verb's OUT in it, and the user's things that have to survive."""

    def __init__(self, scratch: Path, inputs: Path, verb: Verb) -> None:
        self.root = scratch / "place"
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(inputs, self.root, symlinks=True)
        (self.root.parent / "log").write_bytes(b"")
        self.verb, self.out = verb, self.root / f"out{verb.suffix}"

    def beside(self, ending: str) -> Path:
        return self.out.with_name(self.out.name + ending)

    def words(self, out: Path | None = None) -> list[str]:
        return self.verb.words(self.root, out or self.out)

    def log(self) -> str:
        return (self.root.parent / "log").read_text(encoding="utf-8", errors="replace")[-2000:]


def put(path: Path, kind: str, elsewhere: Path) -> None:
    """Something of the user's at `path`."""
    if kind == "folder":
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "mine.txt").write_bytes(MINE)
        (path / "state.json").write_bytes(b"{}")
    elif kind == "file":
        path.write_bytes(MINE)
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "link to a folder":
        put(elsewhere, "folder", elsewhere)
        path.symlink_to(elsewhere)
    elif kind == "link to a file":
        elsewhere.write_bytes(MINE)
        path.symlink_to(elsewhere)
    elif kind == "false mark":
        put(path, "folder", elsewhere)
        (path / "upfit-work.json").write_text('{"pancakes": 3}')
        (path / "recipe.json").write_text('{"pancakes": 3}')


KINDS = ("folder", "file", "empty folder", "link to a folder", "link to a file", "false mark")


@contextlib.contextmanager
def mounted(source: Path, at: Path) -> Iterator[None]:
    if not at.exists():
        at.mkdir() if source.is_dir() else at.touch()
    subprocess.run(["mount", "--bind", source, at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


class Judge:
    def __init__(self, scratch: Path, inputs: Path) -> None:
        self.scratch, self.inputs = scratch, inputs
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.wholes: dict[str, dict[str, str]] = {}
        for verb in VERBS:
            place = Place(scratch, inputs, verb)
            assert run(place.words(), place.root) == 0, (verb.name, place.log())
            self.wholes[verb.name] = whole(place.out)

    def check(self, what: str, place: Place, users: dict[Path, dict[str, str]], names: tuple[str, ...] = ()) -> None:
        """Count a collision; complain where something of the user's is not as it was, or OUT is neither whole nor absent."""
        self.counts[what.split(":")[0]] += 1
        told = f"{place.verb.name}: {what}"
        for path, before in users.items():
            if not os.path.lexists(path):
                self.failures.append(f"{told}: {path.name} is gone\n{place.log()}")
            elif contents(path) != before:
                self.failures.append(f"{told}: {path.name} has changed\n{place.log()}")
        if os.path.lexists(place.out) and place.out not in users:
            right = [self.wholes[name] for name in names or (place.verb.name,)]
            if whole(place.out) not in right:
                self.failures.append(f"{told}: OUT stands and is not whole\n{place.log()}")
        if "Traceback" in place.log():
            self.failures.append(f"{told}: a traceback\n{place.log()}")


def inputs_of(place: Place, *but: str) -> dict[Path, dict[str, str]]:
    return {path: contents(path) for path in place.root.iterdir() if path.name not in but}


def taken_names(judge: Judge, verb: Verb, rounds: int) -> None:
    """Every name that a verb could want beside OUT, taken by the user; also for a dry run."""
    for ending in ENDINGS:
        for kind in KINDS if ending == WORK else ("folder",):
            for flags in ([], ["--dry-run"]) if verb.name.startswith("convert") else ([],):
                place = Place(judge.scratch, judge.inputs, verb)
                put(place.beside(ending), kind, place.root / "elsewhere")
                users = inputs_of(place)
                run([*place.words(), *flags], place.root)
                judge.check(f"name taken: {kind} {ending} {' '.join(flags)}", place, users)


def sources_named_so(judge: Judge, verb: Verb, rounds: int) -> None:
    """The source itself has a name that the verb could want."""
    for ending in ENDINGS:
        place = Place(judge.scratch, judge.inputs, verb)
        source = place.root / verb.source
        named = place.beside(ending)
        os.rename(source, named)
        words = [str(named) if word == str(source) else word for word in place.words()]
        users = inputs_of(place)
        for flags in ([], ["--overwrite"] if verb.overwrites else []):
            run([*words, *flags], place.root)
            judge.check(f"source named so: {ending}", place, users)


def one_folder_two_names(judge: Judge, verb: Verb, rounds: int) -> None:
    for how in ("bind", "link", "inside", "inside by bind", "holds", "work folder"):
        place = Place(judge.scratch, judge.inputs, verb)
        source = place.root / verb.source
        users = inputs_of(place)
        flags = ["--overwrite"] if verb.overwrites else []
        with contextlib.ExitStack() as stack:
            out = place.out
            if how == "bind":
                stack.enter_context(mounted(source, out))
            elif how == "link":
                out.symlink_to(source)
            elif how == "inside":
                out = source / out.name
            elif how == "inside by bind":
                (place.root / "b").mkdir()
                stack.enter_context(mounted(source, place.root / "b"))
                out = place.root / "b" / out.name
            elif how == "holds":
                out = place.root
            else:
                stack.enter_context(mounted(source, place.beside(WORK)))
            run([*place.words(out), *flags], place.root)
            if how in ("bind", "link"):
                users[place.out] = contents(place.out)
            if verb.name == "report" and how.startswith("inside"):  # a page in a model's folder is the user's wish
                users.pop(source)
            judge.check(f"one folder, two names: {how}", place, users)


def out_is_taken(judge: Judge, verb: Verb, rounds: int) -> None:
    """Something of the user's stands at OUT, with --overwrite where there is one."""
    for kind in (*KINDS, "ours and a file", "ours and .git", "mount", "ours and a mount", "link to nothing", "weights"):
        place = Place(judge.scratch, judge.inputs, verb)
        elsewhere, flags = place.root / "elsewhere", ["--overwrite"] if verb.overwrites else []
        with contextlib.ExitStack() as stack:
            if kind in KINDS:
                put(place.out, kind, elsewhere)
            elif kind == "link to nothing":
                place.out.symlink_to(place.root / "nothing")
            elif kind == "weights":
                shutil.copyfile(place.root / "m" / "model.safetensors", place.out)
            else:
                assert run(place.words(), place.root) == 0, place.log()
                if kind == "ours and a file" and place.out.is_dir():
                    (place.out / "notes.txt").write_bytes(MINE)
                elif kind == "ours and .git" and place.out.is_dir():
                    put(place.out / ".git", "folder", elsewhere)
                elif kind == "ours and a mount" and place.out.is_dir():
                    put(elsewhere, "file", elsewhere)
                    stack.enter_context(
                        mounted(elsewhere, next(path for path in sorted(place.out.iterdir()) if path.is_file()))
                    )
                elif kind == "mount":
                    kept = place.root / "kept"
                    os.rename(place.out, kept)
                    stack.enter_context(mounted(kept, place.out))
                else:
                    continue
            users = inputs_of(place)
            if kind == "empty folder" and not verb.suffix:  # an empty folder may be OUT
                users.pop(place.out)
            run([*place.words(), *flags], place.root)
            judge.check(f"OUT is taken: {kind}", place, users)


def out_appears(judge: Judge, verb: Verb, rounds: int) -> None:
    """OUT, or another's work, appears while the verb runs; with and without --overwrite."""
    for number in range(rounds):
        for kind in ("folder", "file", "false mark", "link to a folder"):
            place = Place(judge.scratch, judge.inputs, verb)
            flags = ["--overwrite"] if verb.overwrites and number % 2 else []
            pid = child([*place.words(), *flags], place.root)
            deadline = time.monotonic() + PATIENCE
            while not place.beside(WORK).exists() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                assert time.monotonic() < deadline
            users = {}
            if not os.path.lexists(place.out):
                with contextlib.suppress(FileExistsError):
                    put(place.out, kind, place.root / "elsewhere")
                    users = {place.out: contents(place.out)}
            wait(pid)
            judge.check(f"OUT appears: {kind}", place, users | inputs_of(place, place.out.name, place.beside(WORK).name))


def two_at_one_out(judge: Judge, one: Verb, rounds: int) -> None:
    """Two verbs, or the same one twice, at one OUT at the same time."""
    for number in range(rounds * 2):
        draw = random.Random(number)
        other = draw.choice([one, *VERBS[:4], VERBS[5]])
        place = Place(judge.scratch, judge.inputs, one)
        users = inputs_of(place)
        first = child(place.words(), place.root)
        time.sleep(draw.random() * 0.3)
        second = child(other.words(place.root, place.out), place.root)
        codes = [wait(first), wait(second)]
        judge.check(f"two at one OUT: {one.name}, {other.name}, {codes}", place, users, (one.name, other.name))


def source_rewritten(judge: Judge, verb: Verb, rounds: int) -> None:
    """The weights are replaced while they are read, at the same size: an error, or the result of one of both."""
    after = Place(judge.scratch, judge.inputs, verb)
    other = (after.root / "other" / "model.safetensors").read_bytes()
    (after.root / "m" / "model.safetensors").write_bytes(other)
    assert run(after.words(), after.root) == 0, after.log()
    judge.wholes["of the other"] = whole(after.out)
    for number in range(rounds * 2):
        place = Place(judge.scratch, judge.inputs, verb)
        source = place.root / "m" / "model.safetensors"
        pid = child(place.words(), place.root)
        time.sleep(random.Random(number).random() * 0.6)
        if number % 2:
            with open(source, "r+b") as file:
                file.write(other)
        else:
            (place.root / "new").write_bytes(other)
            os.replace(place.root / "new", source)
        wait(pid)
        judge.check("source rewritten: " + ("in place", "by rename")[number % 2], place, {}, (verb.name, "of the other"))


def killed(judge: Judge, verb: Verb, rounds: int) -> None:
    """Kills at any moment, a file of the user's put into the work folder, and the same command again until it ends."""
    for number in range(rounds):
        place, draw = Place(judge.scratch, judge.inputs, verb), random.Random(number)
        users = inputs_of(place)
        flags = ["--resume"] if verb.name == "uptrain" else []
        for _ in range(draw.randint(1, 3)):
            pid = child([*place.words(), *flags], place.root)
            time.sleep(draw.random() * 1.5)
            os.kill(pid, draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            wait(pid)
            judge.check("killed", place, users)
        note = place.beside(WORK) / "mine.txt"
        if note.parent.exists():
            note.write_bytes(MINE)
            users[note] = contents(note)
        stood = place.out.exists()  # it had ended before the kill: then the command is refused, and OUT stays
        code = run([*place.words(), *flags], place.root)
        if (code and not stood) or not place.out.exists():
            judge.failures.append(f"{verb.name}: after kills the command does not end well ({code})\n{place.log()}")
        judge.check("killed, and again", place, users)


ATTACKS: dict[Callable[[Judge, Verb, int], None], tuple[Verb, ...]] = {
    taken_names: VERBS,
    sources_named_so: VERBS,
    one_folder_two_names: VERBS,
    out_is_taken: VERBS,
    out_appears: VERBS,
    two_at_one_out: VERBS[:4],
    source_rewritten: VERBS[:1],
    killed: VERBS,
}


def make_inputs(scratch: Path) -> Path:
    inputs = scratch / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    (inputs / "t").mkdir(parents=True)
    for seed in range(6):
        (inputs / "t" / f"{seed}.txt").write_text("\n".join(text(100 * seed + line, 40) for line in range(12)))
    save_tiny(inputs / "m", tiny_llama(max_position_embeddings=1024))
    save_tiny(inputs / "other", tiny_llama(max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=500.0))
    other = tiny_llama(max_position_embeddings=1024)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    save_tiny(inputs / "other", other)
    for words in (
        ["convert", "gqa", "m", "g", "--kv-heads", "2", "--method", "mean"],
        ["prepare", "t", "tok", "--tokenizer", "m"],
        ["calibrate", "m", "t", "stats.safetensors", *CALIBRATION],
    ):
        assert run(words, inputs) == 0, (scratch / "log").read_text()
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if "UPFIT_COLLISIONS" not in os.environ:
        os.environ["UPFIT_COLLISIONS"] = "in a mount namespace of its own"
        users = [] if os.geteuid() == 0 else ["--map-root-user"]
        words = ["unshare", "--mount", "--propagation", "private", *users, sys.executable, "-m", "benchmarks.collisions"]
        os.execvp("unshare", [*words, *sys.argv[1:]])
    import torch
    import transformers  # noqa: F401  so that every child has it

    torch.set_num_threads(1)
    args.scratch.mkdir(parents=True, exist_ok=True)
    scratch, began = args.scratch.resolve(), time.monotonic()
    judge = Judge(scratch, make_inputs(scratch))
    for attack, verbs in ATTACKS.items():
        if args.only in attack.__name__:
            for verb in verbs:
                attack(judge, verb, args.rounds)
            counted = sum(judge.counts.values())
            print(f"{attack.__name__}: {counted} collisions so far, {len(judge.failures)} failures", flush=True)
    for failure in judge.failures:
        print(failure)
    result = {"collisions": sum(judge.counts.values()), "kinds": dict(judge.counts), "failures": len(judge.failures)}
    result["seconds"] = round(time.monotonic() - began)
    print(json.dumps(result, indent=2))
    if args.results:
        args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(judge.failures))


if __name__ == "__main__":
    main()
