"""Finds the files that hold text, tells in which form each holds it, and opens them.

Only ordinary files are read, also through links: a pipe would block, and a device never ends.
"""

import os
import re
from pathlib import Path
from typing import Literal

from upfit.bounded import check_ordinary
from upfit.errors import UpfitError

Form = Literal["text", "lines", "json", "parquet"]
FORMS: dict[str, Form] = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet"}
PACKED = ".gz"
FIELD = "text"  # what holds the text of JSON and parquet, unless --field says another
FIELD_HELP = "field of JSON and parquet that holds the text"
# Read when found in a folder by verbs that sample; a file named outright is read whatever it is called.
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts",
    ".go", ".rs", ".rb", ".php", ".sh", ".sql", ".r", ".jl", ".lua", *FORMS,
})
# fmt: on
METADATA = ("metadata.jsonl", "metadata.csv")  # of files and their texts, as datasets lays out a folder of sound or images
HUB_DATA = re.compile(r"\w[\w.\-]*/\w[\w.\-]*(:[\w.\-]+)?")


class NotText(UpfitError):
    """A file that holds no text: refused where it was named, left out and counted where it was found in a folder."""


def is_packed(path: Path) -> bool:
    return path.suffix.casefold() == PACKED


def inner_suffix(path: Path) -> str:
    """`Web.JSONL.gz` → `.jsonl`"""
    return Path(path.stem if is_packed(path) else path.name).suffix.casefold()


def form_of(path: Path) -> Form:
    form = FORMS.get(inner_suffix(path), "text")
    return "text" if form == "parquet" and is_packed(path) else form  # which is then found to be none


def files_below(folder: Path) -> list[Path]:
    """All ordinary files below `folder`, sorted; hidden ones are left out, and links to folders are not followed."""

    def stop(error: OSError) -> None:
        raise UpfitError(f"{error.filename} cannot be listed ({error.strerror}); make it readable or leave it out")

    paths: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.is_file())


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files below a folder, as `files_below` lists them."""
    return files_below(path) if path.is_dir() else [path]


def find_files(name: str, flag: str = "--data") -> list[Path]:
    """The file `name`, or those below the folder whose names are those of text. `flag` is named in errors.

    Raises UpfitError when nothing is there, a folder holds no text, or `name` is a pipe or a device.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise UpfitError(f"{flag} {name} is not here; give text files, .jsonl, .json or .parquet files, or folders of them")
    if not path.is_dir():
        check_ordinary(path)
        return [path]
    paths = [file for file in files_below(path) if inner_suffix(file) in TEXT_SUFFIXES]
    if not paths:
        raise UpfitError(
            f"{flag} {name} holds no text files ({' '.join(sorted(TEXT_SUFFIXES)[:6])} ...); name the files themselves"
        )
    return paths


def has_metadata(name: str) -> bool:
    """Whether `name` is a folder of files (sound, images) with texts."""
    return any((Path(name).expanduser() / metadata).is_file() for metadata in METADATA)


def named_files(names: list[str], flag: str, field: str = FIELD) -> list[Path]:
    """The files that `find_files` finds for all of `names`. Raises UpfitError for a `field` that none of them can have."""
    files = [file for name in names for file in find_files(name, flag)]
    check_field(files, field)
    return files


def check_field(files: list[Path], field: str) -> None:
    """Raise UpfitError when `field` is named and none of the `files` has any."""
    if field != FIELD and all(form_of(file) == "text" for file in files):
        raise UpfitError(f"--field {field} is for {', '.join(FORMS)} files, and there are none; leave it out")


def local_inputs(inputs: list[str], field: str = FIELD) -> list[Path]:
    """Those of `inputs` that lie here, `~` being the home folder.

    Raises UpfitError for one that is neither here nor named like a data set of the hub, one that is no ordinary file, a folder
    without files, and a `field` that none of the inputs can have.
    """
    local = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.exists():
            check_input(path)
            local.append(path)
        elif not HUB_DATA.fullmatch(name) or inner_suffix(path) in TEXT_SUFFIXES:
            raise UpfitError(f"no file or folder at {name}; give a path, or a hub data set such as org/name")
    if len(local) == len(inputs):
        check_field([file for path in local for file in files_of(path)], field)
    return local


def check_input(path: Path) -> None:
    if not path.is_dir():
        check_ordinary(path)
    elif not files_below(path):
        raise UpfitError(f"the folder {path} holds no files (hidden ones are not read); give text")
