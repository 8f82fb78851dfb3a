"""Whether two checkouts of this repository do the same: every verb is run by both, and every byte that they write is compared.

    python -m benchmarks.same_outputs OLD NEW SCRATCH [--demo]

For changes that promise it: modules that move, names that change. OLD and NEW are folders that hold an `upfit` package, SCRATCH
one that is not there yet. Tiny models and texts are made there once (`same_models.py`), and each command is run as
`python -m upfit` in SCRATCH/old and SCRATCH/new, one thread each, side by side. Compared are the files that it wrote, changed
or removed, what it said on stdout and stderr, and its exit status; what is left out is the list MASKS in `same_bytes.py`.
Prints a line a command, and ends with status 1 where something differs or a command does not end as it should.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.same_bytes import difference, masked
from benchmarks.same_models import make_models, make_text
from tests.warm_python import warm_python

SECONDS = 900  # that a command may take
SAID = "said"  # folder of what commands say
TEXT = "--calibration ../text/asyncio --calibration-tokens 2k --calibration-length 128"
RUN = "--length 64 --batch-tokens 256 --dtype float32 --learning-rate 3e-3"
SETTINGS = {  # of uptrain, as config files
    "run": "holdout = 4",
    "measured": "holdout = 4\nmeasure_every = 2",
    "stopped": "holdout = 4\nkeep = 9\nasync_save = false",
    "attention": 'holdout = 4\ntrainable = "attention"\nce_weight = 0.3',
    "answers": "holdout = 2",
}


@dataclass(frozen=True)
class Command:
    """`words` after `python -m upfit`, in the folder of its side.

    It has to end with `status`. `before` is done first, and `beside` while it runs (given its process), in the same folder.
    """

    words: str
    status: int = 0
    before: Callable[[Path], None] = lambda _: None
    beside: Callable[[Path, subprocess.Popen], None] = lambda *_: None


def occupy(side: Path, process: subprocess.Popen) -> None:
    """Something gets the name `stopped` as soon as a step is done, so that the run ends with all that it has kept."""
    while process.poll() is None and not any((side / "stopped.upfit-work").rglob("metrics.jsonl")):
        time.sleep(0.005)
    (side / "stopped").touch()


def make_room(side: Path) -> None:
    (side / "stopped").unlink()


def without_times(name: str) -> Callable[[Path], None]:
    """Pages and pictures show how long steps took, and `push` tells sizes: they are made of a folder that says the same."""

    def rewrite(side: Path) -> None:
        for file in (side / name / "recipe.json", side / name / "metrics.jsonl"):
            file.write_text(masked(file.read_text(encoding="utf-8"), file.name, {}), encoding="utf-8")

    return rewrite


COMMANDS = [
    *map(Command, ["--version", "--help", "list --json", "list", "env --json"]),
    *(Command(f"show ../models/{name}") for name in ("embedded", "phi3", "whisper")),
    *(Command(f"show ../models/{name} --json") for name in ("gpt_neox", "gpt_oss")),
    # Grouped-query attention
    Command("convert gqa ../models/llama dry --kv-heads 2 --dry-run --json"),
    Command("convert gqa ../models/llama llama-mean --kv-heads 2 --method mean --json"),
    Command(f"convert gqa ../models/llama llama-aligned --kv-heads 2 {TEXT}"),
    Command(f"convert gqa ../models/llama llama-plain --kv-heads 2 --no-refit --json {TEXT}"),
    Command("convert gqa ../models/llama llama-random --kv-heads 2 --method random --seed 3 --dtype bfloat16"),
    Command("convert gqa ../models/llama llama-more --kv-heads 4 --method mean"),
    Command("convert mqa ../models/shards shards-first --method first --max-shard-size 200KB"),
    Command("convert gqa ../models/half half-mean --kv-heads 2 --method mean"),
    Command(f"convert gqa ../models/half half-aligned --kv-heads 2 {TEXT}"),
    Command(f"convert gqa ../models/qwen2 qwen2-aligned --kv-heads 2 {TEXT}"),
    Command("convert gqa ../models/qwen3 qwen3-mean --kv-heads 2 --method mean"),
    Command(f"convert gqa ../models/qwen3 qwen3-aligned --kv-heads 2 {TEXT}"),
    Command(f"convert gqa ../models/gemma3 gemma3-aligned --kv-heads 2 {TEXT}"),
    Command(f"convert gqa ../models/mixtral mixtral-aligned --kv-heads 2 {TEXT}"),
    Command(f"convert gqa ../models/gpt_oss gpt_oss-aligned --kv-heads 2 {TEXT}"),
    Command("convert gqa ../models/phi phi-mean --kv-heads 2 --method mean"),
    Command(f"convert gqa ../models/phi phi-aligned --kv-heads 2 {TEXT}"),
    Command(f"convert gqa ../models/phi3 phi3-aligned --kv-heads 2 {TEXT}"),
    Command("convert mqa ../models/falcon falcon-mean --method mean"),
    Command(f"convert mqa ../models/gpt_bigcode gpt_bigcode-aligned {TEXT}"),
    Command("convert gqa ../models/gpt_neox gpt_neox-mean --kv-heads 2 --method mean --json"),
    Command(f"convert mqa ../models/gpt2 gpt2-aligned {TEXT}"),
    *(
        Command(f"convert gqa ../models/{name} {name}-mean --kv-heads 2 --method mean")
        for name in ("bloom", "bart", "whisper", "t5")
    ),
    Command(
        "calibrate ../models/embedded ../text/json ../text/email stats.safetensors --calibration-tokens 2k"
        " --calibration-length 256"
    ),
    Command("convert gqa ../models/embedded dry --kv-heads 2 --calibration stats.safetensors --dry-run --json"),
    Command("convert gqa ../models/embedded small --kv-heads 2 --calibration stats.safetensors"),
    # Differential attention
    Command("convert diff ../models/llama diff-v2 --noise 0.1 --seed 2"),
    Command("convert diff llama-mean diff-head --lambdas head --json"),  # a chain
    Command("convert diff ../models/qwen3 diff-static --variant v2-static"),
    Command(f"convert diff ../models/llama diff-dex --variant dex --heads entropy {TEXT}"),
    Command(f"convert diff ../models/llama diff-split --variant split {TEXT}"),
    Command("convert diff ../models/llama diff-naive --variant split --naive"),
    Command(f"convert diff ../models/llama diff-paper --variant diffllama {TEXT}"),
    Command("convert diff ../models/llama diff-exact --variant diffllama --exact"),
    Command("convert diff ../models/llama dry --dry-run --json"),
    Command("merge diff-head merged --json"),
    Command("merge diff-dex merged-dex"),
    # Contextual positions
    Command(f"convert cope ../models/llama cope {TEXT}"),
    Command(
        f"convert cope ../models/qwen3 cope-keys --gates keys --embeddings heads --every 2 --scale code --positions 16 {TEXT}"
    ),
    Command("convert cope llama-aligned cope-constant --gates constant --drop-rope --span 96"),
    Command("convert cope ../models/llama dry --dry-run --json"),
    # Text, training
    Command("prepare ../text/asyncio ../text/words.jsonl tokens --tokenizer ../models/embedded --tokens 30k --json"),
    Command("prepare ../text/words.jsonl words --tokenizer ../models/embedded"),
    Command("plan small --tokens 50M --gpu h200 --json"),
    Command("plan diff-v2 --tokens 1M --length 256 --stages layerwise=10%,distill"),
    Command(
        f"uptrain small tokens trained --tokens 2k --stages layerwise=30%,distill,lm=30% --json"
        f" --config ../settings/measured.toml {RUN}"
    ),
    Command(f"uptrain llama-mean words learned --tokens 2k --config ../settings/run.toml {RUN}"),
    Command(
        f"uptrain cope tokens stopped --tokens 4k --stages distill --save-every 4 --config ../settings/stopped.toml {RUN}",
        status=1,
        beside=occupy,
    ),
    Command(
        "uptrain cope tokens stopped --tokens 4k --stages distill --save-every 4 --resume"
        f" --config ../settings/stopped.toml {RUN}",
        before=make_room,
    ),
    Command(
        f"uptrain diff-v2 tokens=0.7,words=0.3 mixed --tokens 1k --stages distill --config ../settings/attention.toml {RUN}"
    ),
    Command(
        "synth ../text/email ../text/logging asked --tokenizer ../models/embedded --items 12 --min-tokens 128 --max-tokens 256"
        " --segment-tokens 32 --export messages --json"
    ),
    Command("uptrain small asked answered --tokens 2k --batch-tokens 512 --dtype float32 --config ../settings/answers.toml"),
    # Measuring, telling
    Command("evaluate small --against ../models/embedded --data ../text/json --windows 8 --length 128 --json"),
    Command(
        "evaluate trained --against ../models/embedded --data ../text/json --windows 8 --length 128 --dtype float32 --record"
    ),
    Command(
        "evaluate cope --ablate cope --data ../text/json --windows 4 --length 64 --speed"
        " --speed-lengths 32 --speed-steps 4 --json"
    ),
    Command(
        "evaluate trained --data ../text/json --windows 4 --length 64 --probe needle --probe counting --probe val-document"
        " --probe-samples 4 --probe-length 512 --probe-depths 2 --attention-maps 1 --record --json"
    ),
    Command("evaluate small --data ../text/json --windows 4 --length 64 --tasks pick --task-path ../text/task --json"),
    Command("report trained page.html --png pictures", before=without_times("trained")),
    Command("report mixed --json", before=without_times("mixed")),
    Command("compare trained small llama-mean --json"),
    Command("compare trained small llama-mean"),
    Command("push trained user/trained --license apache-2.0 --base-model user/source --card card.md --dry-run --json"),
    Command("push cope user/cope --license apache-2.0 --dry-run"),
    # What is refused
    Command("convert gqa ../models/llama refused --kv-heads 3", status=1),
    Command("convert gqa ../models/llama llama-mean --kv-heads 2", status=1),
    Command("convert cope ../models/bloom refused", status=1),
    Command("show nowhere", status=1),
    Command("convert gqa ../models/llama", status=2),
]
DEMO = Command("demo shown --tokens 1k --json")


@dataclass
class Side:
    """One of the two checkouts, at work in its `folder` with a Python that is warm."""

    name: str
    checkout: Path
    folder: Path
    python: str = ""
    seen: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Caches are of its own: code that ships inside checkpoints is imported from there."""
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        looks = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
        own = {"HF_HOME": f"{self.folder}.cache", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.checkout)}
        return {**os.environ, **threads, **looks, **own}

    @property
    def places(self) -> dict[str, str]:
        return {str(self.folder): "SIDE", str(self.checkout): "CHECKOUT"}

    def run(self, number: int, command: Command) -> str:
        """Run it, and keep what it says; how it ended, empty if as it should."""
        said = self.folder / SAID / f"{number:02d}"
        command.before(self.folder)
        words = [self.python, "-m", "upfit", *shlex.split(command.words)]
        with open(f"{said}.stdout", "wb") as stdout, open(f"{said}.stderr", "wb") as stderr:
            process = subprocess.Popen(words, cwd=self.folder, env=self.environment, stdout=stdout, stderr=stderr)
            command.beside(self.folder, process)
            status = process.wait(SECONDS)
        if status == command.status:
            return ""
        last = Path(f"{said}.stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"{self.name.upper()} ended with {status}, not {command.status}: {' '.join(last)}"

    def written(self) -> set[str]:
        """The files that were not there, or not as they are, when this was asked before."""
        now = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in self.folder.rglob("*") if path.is_file()}
        changed = {path for path, state in now.items() if self.seen.get(path) != state} | (self.seen.keys() - now.keys())
        self.seen = now
        return {path.relative_to(self.folder).as_posix() for path in changed}


def compared(old: Side, new: Side) -> Iterator[tuple[str, int, str | None]]:
    """Each file that either side has just written or removed: its name, its size, what differs first."""
    for name in sorted(old.written() | new.written()):
        ones, others = old.folder / name, new.folder / name
        if ones.is_file() or others.is_file():
            told = difference(ones, others, old.places, new.places)
            yield name, ones.stat().st_size if ones.is_file() else 0, told


def embedded_model(checkout: Path) -> Path:
    """The folder of the model that ships inside the package, wherever in it that lies."""
    found = [path.parent for path in sorted((checkout / "upfit").rglob("model.safetensors"))]
    assert len(found) == 1, f"{checkout} holds {len(found)} models"
    return found[0]


def run_all(old: Side, new: Side, commands: list[Command]) -> int:
    """Print a line a command; how many of them did not do the same, or not what they should."""
    wrong = 0
    print(f"{'command':90} {'files':>5} {'bytes':>11} {'s':>4}  outcome", flush=True)
    with ThreadPoolExecutor(2) as both:
        for number, command in enumerate(commands):
            began = time.monotonic()
            ends = list(both.map(lambda side: side.run(number, command), (old, new)))  # noqa: B023 (waited for here)
            seconds = time.monotonic() - began
            files = list(compared(old, new))
            trouble = [end for end in ends if end] + [f"{name}: {told}" for name, _, told in files if told is not None]
            words = command.words if len(command.words) <= 90 else command.words[:87] + "..."
            size = sum(size for _, size, _ in files)
            print(f"{words:90} {len(files):5} {size:11,} {seconds:4.0f}  {'equal' if not trouble else trouble[0]}", flush=True)
            for line in trouble[1:]:
                print(f"    {line}", flush=True)
            wrong += bool(trouble)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("old", "new", "scratch"):
        parser.add_argument(name, metavar=name.upper(), type=Path)
    parser.add_argument("--demo", action="store_true", help="upfit demo too, 2 to 3 minutes more")
    args = parser.parse_args()
    scratch = args.scratch.resolve()
    scratch.mkdir(parents=True)
    began, commands = time.monotonic(), [*COMMANDS, DEMO] if args.demo else COMMANDS
    old, new = (Side(name, getattr(args, name).resolve(), scratch / name) for name in ("old", "new"))
    make_text(scratch / "text")
    (scratch / "settings").mkdir()
    for name, lines in SETTINGS.items():
        (scratch / "settings" / f"{name}.toml").write_text(lines + "\n", encoding="utf-8")
    make_models(embedded_model(old.checkout), scratch / "models")
    with ExitStack() as stack:
        for side in (old, new):
            (side.folder / SAID).mkdir(parents=True)
            side.python = stack.enter_context(warm_python(side.environment, side.checkout))
        wrong = run_all(old, new, commands)
    told = f"{wrong} differ" if wrong else "all equal"
    print(f"{len(commands)} commands, {told}; {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
