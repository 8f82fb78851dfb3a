"""Hashes of whole files: their beginnings and ends do not tell of a wrong bit that a run would be built on."""

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

PIECE = 16 * 2**20
THREADS = 4  # of one core each, which hashes faster than a disk reads; training wants the others


def content_hash(path: Path) -> str:
    """The SHA-256 of the SHA-256 of all pieces of a file; read again only when the file was changed. Raises OSError."""
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
    with open(file.path, "rb") as opened, ThreadPoolExecutor(THREADS) as pool:

        def piece(start: int) -> bytes:
            return hashlib.sha256(os.pread(opened.fileno(), PIECE, start)).digest()

        return hashlib.sha256(b"".join(pool.map(piece, range(0, os.fstat(opened.fileno()).st_size, PIECE)))).hexdigest()
