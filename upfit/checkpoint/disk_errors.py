"""Turns errors of the disk while a folder is written into one line that names the file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upfit.checkpoint.output_folder import work_path
from upfit.checkpoint.work_folder import Interrupted

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from a descriptor knows no file: it is one of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """OSErrors as one line: a full disk, one that fails, a file that may not be read or written. Files of a folder that becomes
    `out` are named by their own names alone. What is done by then is kept."""
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else out
        name = place.name if work_path(out.absolute()) in place.parents else str(place)
        why = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
        if error.errno in FULL:
            raise Interrupted(
                f"the disk of {out.parent} is full ({name}: {why}); free some space, and the same command goes on"
            ) from error
        raise Interrupted(f"{out} was not written, for {name} failed: {why}; check the disk and permissions") from error
