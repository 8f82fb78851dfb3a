"""Where the stages of a run leave their models until the last one is done: `OUT.uptrain/stage-1-layerwise/` and so on."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit import history
from upfit.errors import UpfitError
from upfit.uptrain.stages import Stage
from upfit.uptrain.state import STOPPED

if TYPE_CHECKING:
    from upfit.uptrain.train import Job

FOLDER = re.compile(r"stage-\d+-[a-z]+(\.uptrain|\.partial)?")


@dataclass(frozen=True)
class Place:
    """Stage `number` (from 1) of `stages`, on the way to `out`."""

    out: Path
    stages: list[Stage]
    number: int

    @property
    def last(self) -> bool:
        return self.number == len(self.stages)

    @property
    def folder(self) -> Path:
        """The model folder that this stage writes."""
        return self.out if self.last else _between(self.out) / f"stage-{self.number}-{self.stages[self.number - 1].name}"

    @property
    def before(self) -> Path | None:
        """The model folder that it starts from; None for the first stage, which starts from what the user gave."""
        return None if self.number == 1 else Place(self.out, self.stages, self.number - 1).folder

    @property
    def mark(self) -> Path:
        """By which a job script knows that a signal has ended the run, and that it can be gone on with."""
        return _between(self.out) / STOPPED

    @property
    def title(self) -> str:
        return f"{self.number} of {len(self.stages)}, {self.stages[self.number - 1].name}"


def _between(out: Path) -> Path:
    return out.with_name(out.name + ".uptrain")


def finished(place: Place, stage: Stage) -> dict[str, Any] | None:
    """The report of a stage whose folder stands, None where it does not.

    Raises UpfitError when it was made with other settings.
    """
    if place.last or not place.folder.exists():
        return None
    entry = history.read(place.folder)[-1]
    if not stage.agrees(entry["options"]):
        raise UpfitError(f"{place.folder} was made with other settings; resume with the same, or start anew with --overwrite")
    return {"stopped": False, "stage": entry["stage"], **entry["measurements"]}


def make_way(job: "Job", stages: list[Stage]) -> None:
    """Remove the stages of an earlier run where it is to be thrown away.

    Raises UpfitError when there are some and neither --resume nor --overwrite says what to do with them.
    """
    (_between(job.out) / STOPPED).unlink(missing_ok=True)
    found = leftovers(job.out)
    if found and job.overwrite and not job.resume:
        clear_up(job.out)
    elif found and not job.resume:
        raise UpfitError(f"{found[0]} is of an unfinished run; go on with --resume or start anew with --overwrite")


def leftovers(out: Path) -> list[Path]:
    place = _between(out)
    return sorted(path for path in place.iterdir() if FOLDER.fullmatch(path.name)) if place.is_dir() else []


def clear_up(out: Path) -> None:
    """Remove the folders between stages, and what held them unless somebody keeps files there."""
    found = leftovers(out)
    for path in found:
        shutil.rmtree(path)
    if found and not any(_between(out).iterdir()):
        _between(out).rmdir()
