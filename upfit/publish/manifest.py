"""Which files of a folder go to the hub, and whether it may be published: finished, verified, and only the model's files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit import provenance
from upfit.architecture.loading import check_structure
from upfit.checkpoint.output_folder import WORK
from upfit.checkpoint.reader import INDEX, open_checkpoint
from upfit.checkpoint.side_files import NEVER_COPIED, SIDE_FILES, contained
from upfit.errors import UpfitError
from upfit.modeling.registry import is_own, shipped

CARD = "README.md"
LICENCES = ("LICEN[SC]E*", "COPYING*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Manifest:
    """`files`: name in the repository → path here. `left_out`: names of the folder's files that stay here."""

    files: dict[str, Path]
    left_out: list[str]


def check_folder(folder: Path) -> list[dict[str, Any]]:
    """The steps of a folder that may be published. Raises UpfitError for one that Upfit did not write, or did not finish."""
    if not folder.is_dir():
        raise UpfitError(f"no folder at {folder}; give the folder of a converted model")
    if any(part.endswith(WORK) for part in folder.resolve().parts):
        raise UpfitError(f"{folder} is a work folder of an unfinished run; finish it, then push what it writes")
    steps = provenance.read(folder)
    if not steps:
        raise UpfitError(
            f"{folder} has no {provenance.FILE}, so there is nothing to make a model card of; push results of Upfit"
        )
    try:
        with open_checkpoint(folder) as checkpoint:  # headers and sizes of every file
            check_structure(checkpoint)
    except UpfitError as error:
        raise UpfitError(f"{folder} is not whole: {error}") from error
    return steps


def unverified(steps: list[dict[str, Any]]) -> list[str]:
    """A question when the weights are a conversion's that was never checked (an uptraining checks what it writes)."""
    changing = [step for step in steps if step["verb"] != "evaluate"]
    if changing and changing[-1]["verb"] != "uptrain" and not changing[-1]["measurements"].get("verify"):
        return [
            f"`{changing[-1]['verb']}` was run with --no-verify, so nothing has checked these weights; convert again without it"
        ]
    return []


def gather(folder: Path) -> Manifest:
    """Weights, config, tokenizer and the like, the licence, our own code and the records. The card is made, not taken."""
    with open_checkpoint(folder) as checkpoint:
        names = ["config.json", *(path.name for path in checkpoint.files)]
        code = {path.name for path in shipped(checkpoint.config["model_type"])} if is_own(checkpoint.config) else set()
    names += [name for name in (INDEX, provenance.FILE, "metrics.jsonl", *sorted(code)) if (folder / name).exists()]
    for pattern in SIDE_FILES:
        for match in sorted(folder.glob(pattern)):
            inside = sorted(match.rglob("*")) if match.is_dir() else [match]
            names += [str(path.relative_to(folder)) for path in inside if path.is_file() and path.suffix not in NEVER_COPIED]
    files = {name: contained(folder / name, folder) for name in dict.fromkeys(names) if name != CARD}
    everything = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return Manifest(files, [name for name in everything if name not in files and name != CARD])


def has_licence(folder: Path) -> bool:
    return any(True for pattern in LICENCES for _ in folder.glob(pattern))
