"""Finds a source model, in a folder or on the hub.

Every command that reads a model folder uses it. Knows nothing of tensors.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit import provenance
from upfit.addresses import id_and_revision
from upfit.checkpoint import quantised_config
from upfit.checkpoint.reader import INDEX, SINGLE, named_files
from upfit.checkpoint.side_files import NEVER_COPIED, SIDE_FILES
from upfit.errors import UpfitError
from upfit.model_files import check_model_files

WEIGHT_PATTERNS = ("model.safetensors", "model-?????-of-?????.safetensors")  # as transformers names them
STORY_FILES = (provenance.FILE, "metrics.jsonl")
SMALL_FILES = (
    *("config.json", "model.safetensors.index.json", "additional_chat_templates/*"),
    *(*SIDE_FILES, *STORY_FILES, *quantised_config.FILES),
)  # what is fetched of a hub model beside its weights
HUB_ID = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")


@dataclass(frozen=True)
class Source:
    """A model folder that may be read. `name` and `revision` say how the user called it. One that is not `permanent` is gone
    when the work is done."""

    path: Path
    name: str
    revision: str | None = None
    permanent: bool = True

    def record(self) -> dict[str, Any]:
        """How `recipe.json` remembers this source: enough to find it again."""
        return {"name": self.name, "revision": self.revision, "path": str(self.path) if self.permanent else None}


def find_source(name: str, revision: str | None = None) -> Source:
    """A local folder, or a hub id (`id` or `id@revision`) downloaded through the hub's own cache.

    Raises UpfitError when it is neither, or cannot be fetched.
    """
    local = local_source(name)
    if local is not None:
        return local
    hub_id, tagged = id_and_revision(name)
    revision = revision or tagged
    path = _download(hub_id, revision)
    check_model_files(path)
    return Source(path, hub_id, revision)


def local_source(name: str) -> Source | None:
    """The folder that `name` is; None where it may be a hub id. Raises UpfitError when it can be neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        check_model_files(path)
        return Source(path.resolve(), name, None)
    if path.exists():
        raise UpfitError(f"{name} is a file; give the model's folder or a hub id")
    if not HUB_ID.fullmatch(id_and_revision(name)[0]) or name.startswith((".", "/", "~")):
        raise UpfitError(f"no model folder at {name}; give an existing folder or a hub id such as org/model@revision")
    return None


def _download(hub_id: str, revision: str | None) -> Path:
    """The snapshot of a hub model in the hub's cache: small files, and of the weights those that its index names."""
    from huggingface_hub import snapshot_download

    at = f" at revision {revision}" if revision else ""
    failed = f"no folder {hub_id} here, and the hub does not give it{at}"
    with hub_errors(lambda reason: UpfitError(f"{failed}: {reason}; give an existing folder, or check id and network")):
        commit, weights = _weights_of(hub_id, revision)
        wanted, never = [*weights, *SMALL_FILES], [f"*{suffix}" for suffix in NEVER_COPIED - {".safetensors"}]
        revision = commit or revision
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=never))


def _weights_of(hub_id: str, revision: str | None) -> tuple[str | None, Sequence[str]]:
    """The commit, where it is known, and the names of a hub model's weight files. Repositories hold other weights beside:
    consolidated ones, other types, adapters.

    Raises UpfitError for an index that names what is not read, and where a loader could take either of two.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        index = Path(hf_hub_download(hub_id, INDEX, revision=revision))
    except LocalEntryNotFoundError:  # without a network, what was fetched before is all there is
        return None, WEIGHT_PATTERNS
    except EntryNotFoundError:
        return None, [SINGLE]
    names, commit = named_files(index.parent), index.parent.name
    if _has(hub_id, SINGLE, commit):
        both = f"{hub_id} has both {SINGLE} and {INDEX}, and loaders differ in which they take"
        raise UpfitError(f"{both}; give a --revision that has one of them")
    return commit, names


def _has(hub_id: str, file: str, commit: str) -> bool:
    from huggingface_hub import HfApi

    try:
        return HfApi().file_exists(hub_id, file, revision=commit)
    except Exception:  # whatever stands between here and the hub: then what is in its cache decides
        return False


@contextmanager
def hub_errors(as_error: Callable[[str], UpfitError]) -> Iterator[None]:
    """What goes wrong with the hub, or on the way to it, as the error that `as_error` makes of its reason, a line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    client: Any = HfHubHTTPError.__bases__  # what the client of the hub's library raises, whichever it is
    try:
        with one_line_a_try():
            yield
    except UpfitError:
        raise
    except (*client, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise as_error(reason) from error


@contextmanager
def one_line_a_try() -> Iterator[None]:
    """Of what the hub's library says when a request fails in the block, the line that tells of the next try alone: the reason,
    with the whole address, is in the error where no try helps."""
    logger = logging.getLogger("huggingface_hub.utils._http")

    def tells(record: logging.LogRecord) -> bool:
        return "thrown while requesting" not in record.getMessage()

    logger.addFilter(tells)
    try:
        yield
    finally:
        logger.removeFilter(tells)


def teacher_source(folder: Path) -> Source | None:
    """The model that `folder` was converted from, as its `recipe.json` tells; None when it tells of no conversion.

    Raises UpfitError when it tells of one that is no longer where it was.
    """
    record = provenance.teacher(folder)
    if record is None:
        return None
    place = record.get("path")  # a published history tells no places, but the commit of a hub model
    if place and Path(place).is_dir():
        return Source(Path(place), record["name"], record["revision"])
    try:
        return find_source(record["name"], record.get("commit") or record["revision"])
    except UpfitError as error:
        where = f"which is not at {place}" if place else "which is not here"
        raise UpfitError(
            f"{folder / provenance.FILE} names the source {record['name']}, {where}; give it with --teacher"
        ) from error
