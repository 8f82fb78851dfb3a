"""Checkpoints of a run, whole or absent: `OUT.uptrain/step-00000100/`.

A checkpoint is written beside its name, synced and renamed; older ones are removed only after that. Random numbers need no
place in it: every step seeds its own from the run's seed and its number.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from upfit.convert.folders import replace_folder, sync_path, sync_tree
from upfit.errors import UpfitError

WEIGHTS, MOMENTS, FACTS, METRICS = "model.safetensors", "optimizer.safetensors", "trainer.json", "metrics.jsonl"
LOCK = "lock"
STOPPED = "stopped"  # a signal ended the run, and --resume goes on: for job scripts
FORMAT = 1
STEP_NAME = re.compile(r"step-\d{8}")
LEFTOVER = re.compile(r"step-\d{8}\.(tmp|old)")


@dataclass
class Counters:
    """How far a run is. `bad` counts the steps in a row that were skipped, `seconds` the time spent in steps of all starts.

    `rollbacks` are the bursts of bad steps that were undone, oldest first: the steps done before the burst, and the first and
    the end of the steps whose data is left out.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    bad: int = 0
    seconds: float = 0.0
    before: dict[str, float] | None = None
    rollbacks: list[list[int]] = field(default_factory=list)


class Workspace:
    """The folder `OUT.uptrain`, where a run keeps its checkpoints and metrics until OUT is written."""

    def __init__(self, out: Path) -> None:
        out = out.expanduser().resolve()
        self.path = out.with_name(out.name + ".uptrain")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out; raises UpfitError when one is already there."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UpfitError(f"another process is training in {self.path}; wait for it or choose another output") from error
            yield

    def begin(self, resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, None for a new run. Clears the leftovers of runs that are not resumed.

        Raises UpfitError when there are checkpoints and neither `resume` nor `overwrite` says what to do with them.
        """
        (self.path / STOPPED).unlink(missing_ok=True)
        self.sweep()
        found = self.checkpoints()
        if found and resume:
            return found[-1]
        if found and not overwrite:
            at = f"{self.path} holds a run stopped at step {_step_of(found[-1])}"
            raise UpfitError(f"{at}; go on with --resume or start anew with --overwrite")
        self.clear()
        return None

    def sweep(self) -> None:
        """Remove checkpoints that were not finished."""
        for path in self.path.iterdir():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)

    def clear(self) -> None:
        """Remove what a run writes here, and nothing else."""
        self.sweep()
        for path in self.path.iterdir():
            if STEP_NAME.fullmatch(path.name):
                shutil.rmtree(path)
        (self.path / METRICS).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder, unless somebody keeps files of their own in it."""
        self.clear()
        (self.path / LOCK).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first; half-written and damaged ones are passed over."""
        named = (path for path in self.path.iterdir() if STEP_NAME.fullmatch(path.name))
        return sorted((path for path in named if is_complete(path)), key=_step_of)

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters, identity: dict[str, Any], keep: int
    ) -> Path:
        """Write a checkpoint and then remove all but the newest `keep`."""
        target = self.path / f"step-{counters.step:08d}"
        partial = target.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights_of(model), partial / WEIGHTS)
        save_file(moments_of(model, optimizer), partial / MOMENTS)
        sizes = {name: (partial / name).stat().st_size for name in (WEIGHTS, MOMENTS)}
        facts = {"format": FORMAT, "files": sizes, "counters": asdict(counters), "identity": identity}
        (partial / FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
        sync_tree(partial)
        replace_folder(partial, target, target.with_suffix(".old"))
        sync_path(self.path)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return target

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines of metrics.jsonl up to `step`; later ones belong to steps that will be done again."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _is_until(line, step)]
        new = path.with_suffix(".new")
        new.write_text("".join(kept), encoding="utf-8")
        new.replace(path)


def _is_until(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError):
        return False  # the line that was being written when the run was killed


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def is_complete(path: Path) -> bool:
    """Whether every file is there, of the size it was written with, and readable."""
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        for name, size in facts["files"].items():
            if (path / name).stat().st_size != size:
                return False
            with safe_open(path / name, "pt"):
                pass
        return facts["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each shared tensor once."""
    named = dict(model.named_parameters())
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    named |= {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    return {name: tensor.detach().contiguous() for name, tensor in named.items()}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as `exp_avg/NAME`, by the names of the parameters they belong to."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = value.detach().contiguous()
    return found


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> Counters:
    """Load a checkpoint into `model` and `optimizer`; raises UpfitError when it belongs to another run than `identity`."""
    facts = json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
    told, now = facts["identity"], json.loads(json.dumps(identity))
    for name in now | told:
        if told.get(name) != now.get(name):
            raise UpfitError(
                f"the run in {checkpoint.parent} had {name} = {told.get(name)!r}, now it is {now.get(name)!r}; "
                "resume with the same, or start anew with --overwrite"
            )
    current = weights_of(model)
    with safe_open(checkpoint / WEIGHTS, "pt") as file:
        names = list(file.keys())
        assert set(names) == set(current), "the identity agrees, so the names must"
        for name in names:
            current[name].copy_(file.get_tensor(name))
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / MOMENTS, "pt") as file:
        entries = list(file.keys())
        for entry in entries:
            key, _, name = entry.partition("/")
            parameter = parameters[name]
            optimizer.state[parameter][key] = file.get_tensor(entry).to(parameter.device)
    return Counters(**facts["counters"])
