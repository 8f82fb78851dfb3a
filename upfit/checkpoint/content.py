"""SHA-256 over all bytes of files and tensors, computed in pieces by a few threads (hashing releases Python's lock).

A hash of only some of the bytes would take two different models for the same, and use for one what was computed for the other.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from upfit.checkpoint.reader import Checkpoint
from upfit.checkpoint.safetensors_header import TensorInfo, read_exactly

PIECE = 8 * 2**20  # bytes that a thread holds and hashes at once
THREADS = min(8, os.cpu_count() or 1)  # above that the disk is what is waited for
Range = tuple[int, int, int]  # descriptor, first byte, number of bytes


def hash_of(ranges: Iterable[Range]) -> bytes:
    """One hash over these bytes in this order. Raises UpfitError when a file ends before them."""
    whole = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        for piece in pool.map(_hash_piece, _pieces(ranges)):
            whole.update(piece)
    return whole.digest()


def file_hash(path: Path) -> str:
    """The hash of a whole file."""
    with path.open("rb") as file:
        return hash_of([(file.fileno(), 0, os.fstat(file.fileno()).st_size)]).hex()


def tensors_hash(checkpoint: Checkpoint) -> str:
    """The hash of every stored tensor's name, type, shape and bytes, however they are spread over files."""
    stored = checkpoint.stored
    infos = sorted(stored.tensors.values(), key=lambda info: info.name)
    names = "\n".join(f"{info.name} {info.dtype} {info.shape}" for info in infos)
    return hashlib.sha256(names.encode() + hash_of(_range(stored, info) for info in infos)).hexdigest()


def _range(checkpoint: Checkpoint, info: TensorInfo) -> Range:
    return checkpoint.descriptor(info.file), info.start, info.nbytes


def _pieces(ranges: Iterable[Range]) -> Iterator[Range]:
    for descriptor, start, nbytes in ranges:
        for at in range(0, nbytes, PIECE):
            yield descriptor, start + at, min(PIECE, nbytes - at)


def _hash_piece(piece: Range) -> bytes:
    descriptor, start, nbytes = piece
    return hashlib.sha256(read_exactly(descriptor, nbytes, start)).digest()


def content_hash(path: Path) -> str:
    """The hash of a whole file; it is read again only when the file was changed. Raises OSError."""
    state = path.stat()
    # The time of the last change of the inode is set by the system alone; who restores the time of the content moves this one.
    return _hash(_File((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns), path))


@dataclass(frozen=True)
class _File:
    """An unchanged file has the same `state`, even where its folder has been renamed."""

    state: tuple[int, ...]
    path: Path = field(compare=False)


@functools.lru_cache(maxsize=4096)
def _hash(file: _File) -> str:
    return file_hash(file.path)
