"""May OUT be written, and did Upfit write what is there? Every command asks before it writes the first byte.

A folder is Upfit's when it has a `recipe.json` of Upfit that lists every file in it. If somebody has put another file there,
the folder is not replaced. A folder or file that Upfit did not write is never removed.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from upfit import provenance
from upfit.durable import mount_below
from upfit.errors import UpfitError

RESERVE_BYTES = 64 * 2**20  # left free on the disk for everything else
WORK = ".upfit-work"  # what the name of an output's work folder ends with
LONGEST_NAME = 255 - len(WORK) - 10  # bytes of an output's name: file systems take 255, and a work folder's may have ten more


def resolved(out: Path) -> Path:
    """The absolute path of an output. Raises UpfitError for a link to nothing: what it names is not here."""
    out = out.expanduser()
    if out.is_symlink() and not out.exists():
        raise UpfitError(f"output {out} is a link to nothing; remove it, or choose another name")
    return out.resolve()


def work_path(out: Path) -> Path:
    """Where the work on an output (an absolute path) lies until it is whole."""
    return out.with_name(out.name + WORK)


def local_folder(model: str) -> list[Path]:
    """The folder that a model's name means, where it is one here."""
    path = Path(model).expanduser()
    return [path] if path.is_dir() else []


def check_output(out: Path, sources: Iterable[Path], needed_bytes: int, overwrite: bool) -> None:
    """Raise UpfitError when the folder `out` may not be written.

    It must not hold anything (with `overwrite`: anything that is not Upfit's), must not be, hold or lie in one of `sources`
    (whatever they are called: they are compared as files), and the disk must have room.
    """
    out = resolved(out)
    check_place(out, sources, needed_bytes)
    if out.exists() and not out.is_dir():
        raise UpfitError(f"output {out} is a file; choose another name")
    if mount_below(out) is not None:
        raise UpfitError(
            f"output {out} is or holds a mount point, which no folder can be renamed to; choose a folder inside it"
        )
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UpfitError(f"output {out} exists and is not empty; choose another folder or pass --overwrite")
        check_ours(out)


def check_place(out: Path, sources: Iterable[Path], needed_bytes: int) -> None:
    """What holds of every output, be it a folder or a file: its name, its place and its room. `out` is an absolute path."""
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise UpfitError(f"the name of output {out.name[:40]}... is too long; give one of at most {LONGEST_NAME} bytes")
    for source in sources:
        _check_apart(out, source)
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir():
        raise UpfitError(f"output {out}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UpfitError(f"no permission to write in {parent}; choose another place for the output")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + RESERVE_BYTES:
        raise UpfitError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, the output needs {needed_bytes / 1e9:.2f} GB; free some space"
        )


def _check_apart(out: Path, source: Path) -> None:
    source = source.expanduser().resolve()
    if _holds(source, out) or _holds(out, source):
        raise UpfitError(f"output {out} overlaps the source {source}; choose a folder outside it")
    if _holds(work_path(out), source):
        raise UpfitError(f"the source {source} lies where the work on {out} does; move it, or choose another output")


def _holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it. Files are compared, not names: a mount or a link gives a second name."""
    if not folder.exists():
        return False
    return any(place.exists() and os.path.samefile(place, folder) for place in (path, *path.parents))


def check_ours(folder: Path) -> None:
    """Raise UpfitError when `folder` is not one that Upfit wrote, or holds what it did not write."""
    listed = provenance.files(folder)
    if listed is None:
        raise UpfitError(
            f"{folder} holds no {provenance.FILE} that lists its files, so Upfit did not write it; remove it yourself first"
        )
    foreign = next((name for name in names_below(folder) if name not in listed), None)
    if foreign is not None:
        raise UpfitError(f"{folder} holds {foreign}, which Upfit did not write; move it away first")


def names_below(folder: Path) -> list[str]:
    """Every file, link and empty folder below `folder`, by its name relative to it, sorted."""
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        names += [str(Path(root, name).relative_to(folder)) for name in (*files, *links)]
        if not folders and not files and Path(root) != folder:
            names.append(str(Path(root).relative_to(folder)))
    return sorted(names)
