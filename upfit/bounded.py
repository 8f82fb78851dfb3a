"""Reads small files that somebody else may have made: ordinary files only, up to a limit.

A pipe in a file's place is never read to its end, a link to a device never ends, and a file of gigabytes fills the memory
before its first bracket is parsed. Every file that comes from a user or a download and is read whole is read here.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from upfit.errors import UpfitError

SETTINGS_BYTES = 2**20  # what a person writes: a TOML file
CARD_BYTES = 4 * 2**20  # a README.md
RECORD_BYTES = 32 * 2**20  # what Upfit writes as JSON; Python takes some twenty times as much for the worst of it
LINES_BYTES = 256 * 2**20  # what is read line by line
LINE_BYTES = 16 * 2**20  # one line of those: longer than any question, prompt or record of ours
DATA_BYTES = 2**30  # data sets and vocabularies that are read whole
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# What code that takes records apart raises where they are not what they should be.
MISSHAPEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def check_ordinary(path: Path) -> os.stat_result:
    """What the system tells of the file at `path`, through links.

    Raises UpfitError when it is a pipe, a socket, a device or a folder, or when it cannot be looked at.
    """
    with named_errors(path):
        try:
            status = os.stat(path)
        except ValueError as error:  # a zero byte in a name
            raise UpfitError(f"{str(path)!r} is no name of a file ({error})") from error
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise UpfitError(f"{path} is not an ordinary file but {KINDS.get(kind, 'something else')}; put a file there")
    return status


def open_ordinary(path: Path) -> IO[bytes]:
    """The file, open for reading. Raises UpfitError as `check_ordinary` does, without ever waiting for a pipe's other end."""
    check_ordinary(path)  # before it is opened: opening some devices has effects
    with named_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UpfitError(f"{path} is not an ordinary file any more; start again on files at rest")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int) -> bytes:
    """All of a file of at most `most` bytes. Raises UpfitError for a larger one, or one that is no ordinary file."""
    with open_ordinary(path) as file, named_errors(path):
        content = file.read(most + 1)
        if len(content) > most:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise UpfitError(f"{path} has {size} bytes; at most {most} are read of such a file")
    return content


def read_text(path: Path, most: int) -> str:
    """The same as text, line ends as they are. Raises UpfitError when it is not UTF-8."""
    return _decoded(read_bytes(path, most), path)


def read_json(path: Path, most: int) -> Any:
    """The same as JSON. Raises UpfitError when it is none, or is nested too deeply to be read."""
    return parse_json(read_text(path, most), path)


def parse_json(text: str, where: object) -> Any:
    """`text` as JSON; `where` is named when it is none. Raises UpfitError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UpfitError(f"{where} is not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise UpfitError(f"{where} is not valid JSON ({error})") from error


def read_lines(path: Path, most: int = LINES_BYTES) -> Iterator[str]:
    """Line by line, without line ends. Raises UpfitError as `read_text` does, and for a line that is too long to be one."""
    with open_ordinary(path) as file, named_errors(path):
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UpfitError(f"{path} has {size} bytes; at most {most} are read of such a file")
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise UpfitError(f"{path} line {number} has more than {LINE_BYTES} bytes; that is no line of such a file")
            yield _decoded(line, path, number).rstrip("\r\n")


def _decoded(content: bytes, path: Path, line: int | None = None) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"at byte {error.start}" if line is None else f"in line {line}"
        raise UpfitError(f"{path} is not UTF-8 text ({error.reason} {where})") from error


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """What the system says against reading `path`, as one line."""
    try:
        yield
    except OSError as error:
        raise UpfitError(f"{path} cannot be read ({(error.strerror or 'unknown reason').lower()})") from error


@contextmanager
def shaped(what: str) -> Iterator[None]:
    """Raise UpfitError, a line that begins with `what`, where records in the block are not what the block takes them for.

    `what` names the file, what it should be, and what to do: `x.json is not what upfit prepare writes; run it again`.
    """
    try:
        yield
    except UpfitError:
        raise
    except MISSHAPEN as error:
        raise UpfitError(f"{what} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """An exception in a few words: its kind and the beginning of what it says."""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
