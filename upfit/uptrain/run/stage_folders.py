"""Where the stages of a run leave their models until the last one is done: `OUT.upfit-work/stage-1-layerwise/` and so on.

The checkpoints of the last stage, and the mark of a clean stop, lie in the work folder itself; those of a stage before it in
`OUT.upfit-work/stage-1-layerwise.steps/`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from upfit.checkpoint.output_folder import work_path
from upfit.durable import remove_tree
from upfit.errors import UpfitError
from upfit.uptrain.run.state import STOPPED, Workspace
from upfit.uptrain.stages import Stage

FOLDER = re.compile(r"stage-\d+-[a-z]+(\.steps|\.partial)?")


@dataclass(frozen=True)
class StageFolder:
    """Stage `number` (from 1) of `stages` of a run that writes `out`, an absolute path."""

    out: Path
    stages: list[Stage]
    number: int

    @property
    def work(self) -> Path:
        return work_path(self.out)

    @property
    def last(self) -> bool:
        return self.number == len(self.stages)

    @property
    def name(self) -> str:
        return f"stage-{self.number}-{self.stages[self.number - 1].name}"

    @property
    def folder(self) -> Path:
        """The model folder that this stage writes."""
        return self.out if self.last else self.work / self.name

    @property
    def before(self) -> Path | None:
        """The model folder that it starts from; None for the first stage, which starts from what the user gave."""
        return None if self.number == 1 else StageFolder(self.out, self.stages, self.number - 1).folder

    @property
    def workspace(self) -> Workspace:
        """Where its checkpoints are."""
        return Workspace(self.work if self.last else self.work / f"{self.name}.steps")

    @property
    def mark(self) -> Path:
        """By which a job script knows that a signal has ended the run, and that it can be gone on with."""
        return self.work / STOPPED

    @property
    def title(self) -> str:
        return f"{self.number} of {len(self.stages)}, {self.stages[self.number - 1].name}"


def make_way(work: Path, resume: bool, overwrite: bool) -> None:
    """Remove the mark of a clean stop, and the stages of an earlier run where it is to be thrown away.

    Raises UpfitError when there are some and neither `resume` nor `overwrite` says what to do with them.
    """
    (work / STOPPED).unlink(missing_ok=True)
    earlier = sorted(path for path in work.iterdir() if FOLDER.fullmatch(path.name))
    if earlier and not resume and not overwrite:
        raise UpfitError(f"{earlier[0]} is of an unfinished run; go on with --resume or start anew with --overwrite")
    if earlier and not resume:
        for path in earlier:
            remove_tree(path)
