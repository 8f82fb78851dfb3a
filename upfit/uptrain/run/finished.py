"""What is finished already, a run or a stage of one. `--resume` answers with it, so that a job script can always pass
`--resume`.

Names and settings are not enough: the model, and where they still are its teacher and the data, must have the content that was
trained from. Nothing is written here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from upfit import provenance
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.source import Source
from upfit.errors import UpfitError
from upfit.uptrain.data.open_data import Data
from upfit.uptrain.model.model_traits import fingerprint
from upfit.uptrain.run.result import Uptraining
from upfit.uptrain.run.stage_folders import StageFolder
from upfit.uptrain.stages import Stage

SAME_OR_ANEW = "resume with the same, or start anew with --overwrite"


def finished_run(out: Path, stages: list[Stage], opened: list[Data] | None, source: Source) -> Uptraining | None:
    """The report of the run that made `out`, if it was of these stages, on this data, from this model; else None. `opened` is
    None where the data are gone: then it was on what was called so.

    A signal's mark in the work folder tells that a later run was stopped: that one is not finished.
    """
    if StageFolder(out, stages, 1).mark.exists():
        return None
    entries = _steps(out)[-len(stages) :]
    data: list[Data | None] = [*opened] if opened is not None else [None] * len(stages)
    if len(entries) != len(stages) or not all(map(_made, entries, stages, data)) or not _learned(entries, source):
        return None
    return together(list(map(_report, entries)), len(stages))


def learned_answers(out: Path) -> bool:
    """Whether the last training of what stands in `out` was on questions."""
    steps = _steps(out)
    return bool(steps) and "items" in (steps[-1].get("data") or {})


def _steps(out: Path) -> list[dict[str, Any]]:
    """The history of a model that is whole, but for evaluations, which may have been recorded since; empty where none is."""
    try:
        with open_checkpoint(out):
            return [step for step in provenance.read(out) if step["verb"] != "evaluate"]
    except UpfitError:
        return []


def finished_stage(stage_folder: StageFolder, stage: Stage, data: Data, start: Source) -> Uptraining | None:
    """The report of a stage whose folder stands, None where it does not; `start` is the model that it starts from.

    Raises UpfitError when it was made with other settings, on other data, or from other models.
    """
    folder = stage_folder.folder
    if stage_folder.last or not folder.exists():
        return None
    entry = provenance.read(folder)[-1]
    if not stage.agrees(entry["options"]):
        raise UpfitError(f"{folder} was made with other settings; {SAME_OR_ANEW}")
    if not _made(entry, stage, data):
        raise UpfitError(f"{folder} was not made of what {', '.join(map(str, data.folders))} holds now; {SAME_OR_ANEW}")
    if not _learned([entry], start):
        raise UpfitError(f"{start.name} or its teacher has changed since {folder} was made; {SAME_OR_ANEW}")
    return _report(entry)


def together(reports: list[Uptraining], stages: int) -> Uptraining:
    """The report of a run of so many stages from those that were begun: that of the last one, and of several all of them."""
    return reports[-1] if stages == 1 else replace(reports[-1], stages=reports)


def _report(entry: dict[str, Any]) -> Uptraining:
    return Uptraining.read({"stopped": False, "stage": entry["stage"], **entry["measurements"]})


def _made(entry: dict[str, Any], stage: Stage, data: Data | None) -> bool:
    """Whether a step of recipe.json is of this stage, on this data; without any, on what was called as the stage calls it."""
    if entry["verb"] != "uptrain" or stage.name not in (None, entry.get("stage")):
        return False
    record = entry.get("data") or {}
    if data is None:
        same = record.get("folder") == str(Path(stage.data).expanduser().resolve())
    else:
        same = record.get("fingerprint") == data.fingerprint
    return same and stage.agrees(entry["options"])


def _learned(entries: list[dict[str, Any]], source: Source) -> bool:
    """Whether the first of these steps started from the model that `source` holds now, and all learned from what their teachers
    still are, where they still are."""
    known = [entry.get("fingerprints") or {} for entry in entries]
    paths = [(entry.get("teacher") or {}).get("path") for entry in entries]
    teachers = [(prints.get("teacher"), Path(path)) for prints, path in zip(known, paths, strict=True) if path]
    if known[0].get("model") != fingerprint(source.path):
        return False
    return all(fingerprint(folder) == expected for expected, folder in teachers if folder.is_dir())
