"""Where a source model lies, and which of its files travel with the weights.

Used by every verb that reads a model folder. Knows nothing of tensors.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit import history
from upfit.errors import UpfitError
from upfit.own import is_own, shipped

# What travels with the weights. Code (*.py) and pickles never do.
SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICEN[SC]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
WEIGHT_PATTERNS = ("*.safetensors", "model.safetensors.index.json", "config.json")
STORY_FILES = (history.FILE, "metrics.jsonl")
HUB_ID = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")
NEVER_COPIED = {".py", ".bin", ".pt", ".pth", ".pkl", ".safetensors"}


@dataclass(frozen=True)
class Source:
    """A model folder that may be read. `name` and `revision` say how the user called it. One that is not `kept` is gone when
    the work is done."""

    path: Path
    name: str
    revision: str | None = None
    kept: bool = True

    def record(self) -> dict[str, Any]:
        """How `recipe.json` remembers this source: enough to find it again."""
        return {"name": self.name, "revision": self.revision, "path": str(self.path) if self.kept else None}


def find_source(name: str, revision: str | None = None) -> Source:
    """A local folder, or a hub id (`id` or `id@revision`) downloaded through the hub's own cache.

    Raises UpfitError when it is neither, or cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(path.resolve(), name, None)
    hub_id, _, tagged = name.partition("@")
    if path.exists():
        raise UpfitError(f"{name} is a file; give the model's folder or a hub id")
    if not HUB_ID.fullmatch(hub_id) or name.startswith((".", "/", "~")):
        raise UpfitError(f"no model folder at {name}; give an existing folder or a hub id such as org/model@revision")
    revision = revision or tagged or None
    return Source(_download(hub_id, revision), hub_id, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHT_PATTERNS, *SIDE_FILES, *STORY_FILES, "additional_chat_templates/*"]
    at = f" at revision {revision}" if revision else ""
    with hub_errors(lambda reason: UpfitError(f"no folder {hub_id} here, and the hub does not give it{at}: {reason}")):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


@contextmanager
def hub_errors(told: Callable[[str], UpfitError]) -> Iterator[None]:
    """What goes wrong with the hub, or on the way to it, as the error that `told` makes of its reason, a line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except UpfitError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise told(reason) from error


def teacher_source(folder: Path) -> Source | None:
    """The model that `folder` was converted from, as its `recipe.json` tells; None when it tells of no conversion.

    Raises UpfitError when it tells of one that is no longer where it was.
    """
    told = history.teacher(folder)
    if told is None:
        return None
    place = told.get("path")  # a published history tells no places, but the commit of a hub model
    if place and Path(place).is_dir():
        return Source(Path(place), told["name"], told["revision"])
    try:
        return find_source(told["name"], told.get("commit") or told["revision"])
    except UpfitError as error:
        where = f"which is not at {place}" if place else "which is not here"
        raise UpfitError(f"{folder / history.FILE} names the source {told['name']}, {where}; give it with --teacher") from error


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, generation settings, chat templates, licence and README; the names that were copied, sorted."""
    copied = []
    for pattern in SIDE_FILES:
        for found in sorted(source.glob(pattern)):
            for path in sorted(found.rglob("*")) if found.is_dir() else [found]:
                name = str(path.relative_to(source))
                if path.is_dir() or path.suffix in NEVER_COPIED or name in copied:
                    continue
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(contained(path, source), target / name)
                copied.append(name)
    return sorted(copied)


def copy_code(config: dict[str, Any], target: Path) -> None:
    """The modelling files of one of our model types, from this installation and never from the source folder."""
    if is_own(config):
        for path in shipped(config["model_type"]):
            shutil.copyfile(path, target / path.name)


def contained(path: Path, folder: Path) -> Path:
    """The real file behind `path`, which must lie in `folder` or, for a hub cache snapshot, in that repository's blobs.

    Raises UpfitError when a link leads anywhere else.
    """
    real, folder = path.resolve(), folder.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(place in real.parents for place in allowed):
        raise UpfitError(f"{path} is a link to {real}, outside the model folder; copy the file into the folder")
    return real
