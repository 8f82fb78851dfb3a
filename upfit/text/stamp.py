"""Tells by its content whether a text is the one that unfinished work began with."""

import hashlib
import os
from pathlib import Path
from typing import IO

from upfit.bounded import open_ordinary

WHOLE_BYTES = 8 * 2**20  # of a file that is hashed whole
SAMPLES, SAMPLE_BYTES = 64, 2**14  # 1 MB of a larger one


def content_stamp(files: list[Path]) -> str:
    """A hash (64 hexadecimal digits) that differs when a file was changed or replaced, also by one of the same size and time.

    It covers names and sizes, the whole content of files up to WHOLE_BYTES, and of larger ones SAMPLES pieces spread over them
    with the times of the last change of content and state and the inode, so that of those a copy counts as another file.
    Raises UpfitError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        with open_ordinary(path) as file:
            state = os.fstat(file.fileno())
            digest.update(f"{os.fsencode(path)!r} {state.st_size} ".encode())
            if state.st_size > WHOLE_BYTES:
                digest.update(f"{state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino} ".encode())
            digest.update(_content(file, state.st_size).digest())
    return digest.hexdigest()


def _content(file: IO[bytes], size: int) -> "hashlib._Hash":
    digest = hashlib.sha256()
    if size <= WHOLE_BYTES:
        digest.update(file.read(WHOLE_BYTES + 1))
        return digest
    for index in range(SAMPLES):
        file.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
        digest.update(file.read(SAMPLE_BYTES))
    return digest
