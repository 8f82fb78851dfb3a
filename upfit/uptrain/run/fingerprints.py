"""Hashes of whole files: their beginnings and ends do not tell of a wrong bit that a run would be built on."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from upfit.checkpoint.content import file_hash


def content_hash(path: Path) -> str:
    """The hash of a whole file; it is read again only when the file was changed. Raises OSError."""
    state = path.stat()
    # The time of the last change of the inode is set by the system alone; who restores the time of the content moves this one.
    return _hash(_File((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns), path))


@dataclass(frozen=True)
class _File:
    """The same file, unchanged, where `state` is the same: its folder may have got another name."""

    state: tuple[int, ...]
    path: Path = field(compare=False)


@functools.lru_cache(maxsize=4096)
def _hash(file: _File) -> str:
    return file_hash(file.path)
