"""Checkpoints of a run, whole or absent: `OUT.upfit-work/step-00000100/`.

A checkpoint is written beside its name (see saver.py), synced and renamed; older ones are removed only after that. Random
numbers need no place in it: every step seeds its own from the run's seed and its number. Tensors are kept by torch's
distributed checkpoint under `KIND/NAME`, such as `weight/model.norm.weight` or `exp_avg/model.norm.weight`, so any number of
processes, sharding or not, can go on from what any other has written.
"""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from upfit.checkpoint.content import content_hash
from upfit.durable import remove_tree, rename_new, sync_tree, write_whole
from upfit.errors import UpfitError
from upfit.uptrain.model.parallel import plain

WEIGHT, FACTS, METRICS = "weight", "trainer.json", "metrics.jsonl"
STOPPED = "stopped"  # a signal ended the run, and --resume goes on: for job scripts
FORMAT = 2
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
    """The folder `path`, in OUT's work folder, where a stage keeps its checkpoints and metrics until its model is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, None for a new run. Clears the leftovers of runs that are not resumed.

        Raises UpfitError when there are checkpoints and neither `resume` nor `overwrite` says what to do with them.
        """
        self.path.mkdir(exist_ok=True)
        self.sweep()
        newest = self.newest()
        if newest and resume:
            return newest
        if newest and not overwrite:
            at = f"{self.path} holds a run stopped at step {_step_of(newest)}"
            raise UpfitError(f"{at}; go on with --resume or start anew with --overwrite")
        self.clear()
        return None

    def sweep(self) -> None:
        """Remove checkpoints that were not finished."""
        for path in self.path.iterdir():
            if LEFTOVER.fullmatch(path.name):
                remove_tree(path)

    def clear(self) -> None:
        """Remove what a run writes here, and nothing else."""
        self.sweep()
        for path in self._named():
            discard(path)
        (self.path / METRICS).unlink(missing_ok=True)

    def checkpoints(self) -> Iterator[Path]:
        """The complete checkpoints, newest first; half-written and damaged ones are passed over.

        Each is read whole for that, and not before it is asked for.
        """
        return filter(is_complete, self._named())

    def newest(self) -> Path | None:
        return next(self.checkpoints(), None)

    def _named(self) -> list[Path]:
        named = (path for path in self.path.iterdir() if STEP_NAME.fullmatch(path.name))
        return sorted(named, key=_step_of, reverse=True)

    def partial(self, step: int) -> Path:
        """Where the checkpoint of `step` is written until it is whole."""
        return self.path / f"step-{step:08d}.tmp"

    def publish(self, counters: Counters, identity: dict[str, Any], keep: int) -> Path:
        """Give the checkpoint whose tensors are written its name, and then remove what is older than the newest `keep`."""
        partial = self.partial(counters.step)
        files = {path.name: [path.stat().st_size, digest(path)] for path in sorted(partial.iterdir())}
        record = {"format": FORMAT, "files": files, "counters": asdict(counters), "identity": identity}
        (partial / FACTS).write_text(json.dumps(record, indent=2), encoding="utf-8")
        sync_tree(partial)
        target = partial.with_suffix("")
        if target.exists():  # damaged, or of steps that were undone
            discard(target)
        rename_new(partial, target)
        staying = list(islice(self.checkpoints(), keep))
        if len(staying) == keep:
            for old in self._named():
                if _step_of(old) < _step_of(staying[-1]):
                    discard(old)
        return target

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines of metrics.jsonl up to `step`; later ones belong to steps that will be done again."""
        path = self.path / METRICS
        if not path.exists():
            return
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _is_until(line, step)]
        write_whole(path, "".join(lines))


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint under another name, so that one that is half removed has none."""
    leaving = checkpoint.with_suffix(".old")
    remove_tree(leaving)
    remove_tree(checkpoint.rename(leaving))


def _is_until(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError):
        return False  # the line that was being written when the run was killed


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def is_complete(path: Path) -> bool:
    """Whether every file is there, of the size and the content it was written with."""
    try:
        record = json.loads((path / FACTS).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            return False
        files = {path / name: expected for name, expected in record["files"].items()}
        return all([file.stat().st_size, digest(file)] == expected for file, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def digest(path: Path) -> str:
    """A hash of a file's whole content: a checkpoint with one wrong number would be gone on from as if nothing were."""
    return content_hash(path)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each shared tensor once."""
    named = dict(model.named_parameters())
    shared = {plain(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    named |= {name: tensor for name, tensor in model.state_dict().items() if plain(name) not in shared}
    return {plain(name): tensor.detach() for name, tensor in named.items()}


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that training changes: weights as `weight/NAME`, the optimiser's tensors as `exp_avg/NAME` and so on."""
    tensors = {f"{WEIGHT}/{name}": tensor for name, tensor in weights_of(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{plain(name)}"] = value.detach()
    return tensors


def restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    group: torch.distributed.ProcessGroup | None,
) -> Counters:
    """Load a checkpoint into `model` and `optimizer`; raises UpfitError when it belongs to another run than `identity`.

    Every process loads what it holds of them: shards with those of `group`, whole tensors (None) for itself.
    """
    record = json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
    before, now = record["identity"], json.loads(json.dumps(identity))
    for name in now | before:
        if before.get(name) != now.get(name):
            raise UpfitError(
                f"the run in {checkpoint.parent} had {name} = {before.get(name)!r}, now it is {now.get(name)!r}; "
                "resume with the same, or start anew with --overwrite"
            )
    wanted = {f"{WEIGHT}/{name}": tensor for name, tensor in weights_of(model).items()}
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert {name for name in stored if name.startswith(WEIGHT)} == set(wanted), "the identity agrees, so the names must"
    parameters = {plain(name): parameter for name, parameter in model.named_parameters()}
    for entry, known in stored.items():
        key, _, name = entry.partition("/")
        if key != WEIGHT:
            assert isinstance(known, TensorStorageMetadata), entry
            wanted[entry] = optimizer.state[parameters[name]][key] = empty_like(parameters[name], known)
    expect_one_process()
    dcp.load(wanted, checkpoint_id=checkpoint, process_group=group, no_dist=group is None)
    return Counters(**record["counters"])


def empty_like(parameter: Tensor, known: TensorStorageMetadata) -> Tensor:
    """Room for a tensor of the optimiser, sharded as `parameter` is where it has a number for each of its numbers."""
    if known.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=known.properties.dtype, requires_grad=False)
    return torch.zeros(known.size, dtype=known.properties.dtype, device=parameter.device)


def expect_one_process() -> None:
    """torch warns that a checkpoint concerns one process only; where that is so, it is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
