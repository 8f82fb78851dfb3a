"""Folders in and out: where a source model lies, and how an output folder appears whole or not at all.

Used by every verb that reads or writes a model folder. Knows nothing of tensors.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit import history
from upfit.convert import quantised
from upfit.convert.remote_code import side_file
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
WEIGHT_PATTERNS = ("model.safetensors", "model-?????-of-?????.safetensors")  # as transformers names them
JOURNAL = "conversion.jsonl"  # in a folder that is being written: what of it is finished
STORY_FILES = (history.FILE, "metrics.jsonl")
SMALL_FILES = (
    *("config.json", "model.safetensors.index.json", "additional_chat_templates/*"),
    *(*SIDE_FILES, *STORY_FILES, *quantised.FILES),
)  # what is fetched of a hub model beside its weights
HUB_ID = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")
NEVER_COPIED = {".py", ".bin", ".pt", ".pth", ".pkl", ".safetensors"}
RESERVE_BYTES = 64 * 2**20  # left free on the disk for everything else


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
    """The snapshot of a hub model in the hub's cache: small files, and of the weights those that its index names."""
    from huggingface_hub import snapshot_download

    at = f" at revision {revision}" if revision else ""
    with hub_errors(lambda reason: UpfitError(f"no folder {hub_id} here, and the hub does not give it{at}: {reason}")):
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

    from upfit.convert.checkpoint import INDEX, SINGLE, named_files

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
def hub_errors(told: Callable[[str], UpfitError]) -> Iterator[None]:
    """What goes wrong with the hub, or on the way to it, as the error that `told` makes of its reason, a line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    client: Any = HfHubHTTPError.__bases__  # what the client of the hub's library raises, whichever it is
    try:
        yield
    except UpfitError:
        raise
    except (*client, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
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


def check_output(out: Path, source: Path, needed_bytes: int, overwrite: bool) -> None:
    """Raise UpfitError when `out` may not be written: it holds something, overlaps `source`, or the disk is too small."""
    out, source = out.expanduser().resolve(), source.resolve()
    if out == source or out in source.parents or source in out.parents:
        raise UpfitError(f"output {out} overlaps the source {source}; choose a folder outside it")
    if out.exists() and not out.is_dir():
        raise UpfitError(f"output {out} is a file; choose another name")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UpfitError(f"output {out} exists and is not empty; choose another folder or pass --overwrite")
        if not (out / history.FILE).exists():
            raise UpfitError(f"output {out} holds no {history.FILE}, so Upfit did not write it; remove it yourself first")
    parent = next(p for p in out.parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise UpfitError(f"no permission to write in {parent}; choose another place for the output")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + RESERVE_BYTES:
        raise UpfitError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, the output needs {needed_bytes / 1e9:.2f} GB; free some space"
        )


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """An empty folder `OUT.fit` beside `out`, made when the block makes it and removed when the block ends.

    What a killed run left there is cleared.
    """
    out = out.expanduser().resolve()
    folder = out.with_name(out.name + ".fit")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged(out: Path, resumable: bool = False) -> Iterator[Path]:
    """A sibling folder to write into, which becomes `out` when the block ends well, in one rename after everything is synced.

    On an error it is removed; after a kill it is left as `OUT.partial`, which the next run clears. With `resumable` the next
    run finds it as it was left, also where the user stopped the work or a download failed (`Interrupted`). A folder that stood
    at `out` (the caller has checked that it may go) is replaced at the very end. Raises UpfitError when another process is
    writing to the same place.
    """
    out = out.expanduser().resolve()
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock_path = out.with_name(f".{out.name}.lock")
    with open(lock_path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UpfitError(f"another process is writing {out}; wait for it or choose another output") from error
        try:
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=resumable)
            try:
                yield partial
                sync_tree(partial)
                (partial / JOURNAL).unlink(missing_ok=True)
                replace_folder(partial, out, old)
            except BaseException as error:
                if not (resumable and isinstance(error, Interrupted | KeyboardInterrupt)):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            lock_path.unlink(missing_ok=True)


class Interrupted(UpfitError):
    """The work could not go on, and the same command can go on with it later."""


def replace_folder(new: Path, out: Path, old: Path) -> None:
    """Put `new` where `out` is. What was there is kept as `old` until `new` stands."""
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    new.rename(out)
    sync_path(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that a rename afterwards can never show half-written data."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root, name))
        sync_path(Path(root))


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_side_files(source: Path) -> dict[str, Path]:
    """The side files of a model folder, sorted: names within it, and the files behind them.

    Raises UpfitError for what cannot be copied: a link out of the folder or to nothing, what is no ordinary file, what may not
    be read.
    """
    found: dict[str, Path] = {}
    for pattern in SIDE_FILES:
        for beginning in source.glob(pattern):
            for path in beginning.rglob("*") if beginning.is_dir() else [beginning]:
                if path.suffix not in NEVER_COPIED and not path.is_dir():
                    found[str(path.relative_to(source))] = _ordinary(path, source)
    return dict(sorted(found.items()))


def _ordinary(path: Path, source: Path) -> Path:
    real = contained(path, source)
    if not real.exists():
        raise UpfitError(f"{path} is a link to nothing; fetch the file again, or remove the link")
    if not real.is_file():
        raise UpfitError(f"{path} is no ordinary file and cannot be copied; remove it")
    if not os.access(real, os.R_OK):
        raise UpfitError(f"no permission to read {path}, which goes with the weights; change it, or remove the file")
    return real


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, generation settings, chat templates, licence and README; the names that were copied, sorted.

    Raises UpfitError as `check_side_files` does.
    """
    files = check_side_files(source)
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(side_file(path))
    return list(files)


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
