"""Reads the bytes of a file. Compressed files are unpacked while they are read, up to a limited multiple of their size."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from upfit.bounded import named_errors, open_ordinary
from upfit.errors import UpfitError
from upfit.text.files import is_packed

CHUNK = 2**20
FREE_BYTES = 64 * 2**20  # are unpacked whatever their ratio: a short text repeated is honest, too
MOST_RATIO = 200  # prose packs to a third, logs to a thirtieth; gzip itself can do a thousandth


class Damaged(UpfitError):
    """A compressed file that cannot be trusted: always refused, because what it holds may be text."""


class Growth:
    """How far a file has grown while it was unpacked. Raises Damaged when it grew more than text can."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0

    def add(self, nbytes: int, read: int) -> None:
        """`nbytes` more came out; `read` bytes of the file have been read for all of it so far."""
        self.bytes += nbytes
        if self.bytes > FREE_BYTES and self.bytes > MOST_RATIO * read:
            raise Damaged(
                f"{self.path} unpacks to over {MOST_RATIO} times its size, as text does not; unpack it yourself if it is text"
            )


class Unpacking(io.RawIOBase):
    """The content of the gzip file `file`. Raises Damaged, which names `path`."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.growth = file, path, Growth(path)
        self.content = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            piece = self.content.read(min(len(buffer), CHUNK))
        except (EOFError, OSError, zlib.error) as error:
            raise Damaged(f"{self.path} is no gzip file, damaged or cut short ({error}); fetch it again") from error
        self.growth.add(len(piece), self.file.tell())
        buffer[: len(piece)] = piece
        return len(piece)


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of the file at `path`, and the file as it lies there, whose position is how far reading has come.

    Raises UpfitError when it is not an ordinary file, Damaged while it is read.
    """
    with open_ordinary(path) as file, named_errors(path):
        if is_packed(path):
            yield io.BufferedReader(Unpacking(file, path), CHUNK), file
        else:
            yield file, file


def unpacked_size(path: Path) -> int:
    """Bytes of the content. A packed file is read for it: what its end says of its size is true of small files only."""
    with opened(path) as (content, _):
        if not is_packed(path):
            return content.seek(0, io.SEEK_END)
        return sum(map(len, iter(lambda: content.read(CHUNK), b"")))
