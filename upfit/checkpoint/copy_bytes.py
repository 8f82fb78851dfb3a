"""Copies bytes from one file into a place of another, in the cheapest way that the system offers for these two files.

    reflink   the file system lets both files share the blocks (XFS, btrfs, bcachefs): nothing is read and nothing written
    direct    whole blocks go between the disk and one buffer, past the page cache (O_DIRECT)
    kernel    copy_file_range: copied inside the kernel, or by a file server
    plain     read and write

They are tried in this order, and one that the system refuses is not tried again. The first two copy whole blocks only; the
edges of a run are copied the plain way. Linux has all four, other systems some.
"""

import errno
import fcntl
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from upfit.checkpoint.disk_errors import naming
from upfit.checkpoint.safetensors_header import read_exactly

WAYS = ("reflink", "direct", "kernel", "plain")
SEEN = ("direct", "plain")  # the bytes pass through this process, so that a checksum costs no reading
BLOCK = max(4096, mmap.PAGESIZE)  # a page that is written past the page cache must not be half in it
CHUNK = 8 * 2**20  # large enough to keep a disk busy, small enough for a bar that moves
WORKERS = 2  # one chunk is read while another one is written
REFUSALS = {
    errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.ENOTTY, errno.ENOENT,
    errno.EACCES,
}  # fmt: skip
FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), linux/fs.h


@dataclass(frozen=True)
class ByteRange:
    """`nbytes` from `start` of a source file, to be put at `place` of a target file."""

    file: Path
    start: int
    nbytes: int
    place: int


@dataclass(frozen=True)
class CopiedRange:
    """`nbytes` at offset `place` of a target file. `crc` is their CRC-32. It is None where the bytes never passed through
    this process; they are then those from `start` of `file`. `shared`: both files use the same blocks of the disk."""

    place: int
    nbytes: int
    crc: int | None
    file: str | None = None
    start: int = 0
    shared: bool = False


Report = Callable[[CopiedRange], None]


class ByteCopier:
    """Copies byte ranges between open files; a context manager, since some ways need the files opened once more."""

    def __init__(self, ways: list[str]) -> None:
        self.ways = ways  # shared by the copiers of one conversion: what was refused once is not tried again
        self._reopened: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def __enter__(self) -> "ByteCopier":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._reopened.values():
            os.close(descriptor)
        self._reopened.clear()

    def move(self, source: int, target: int, byte_range: ByteRange, report: Report) -> None:
        """Copy a byte range from descriptor `source` to `target`; `report` hears of each piece that stands, from several
        threads.

        Raises UpfitError when the source ends before the range does.
        """
        with ThreadPoolExecutor(WORKERS) as pool:
            parts = [pool.submit(self._part, source, target, part, report) for part in chunks(byte_range)]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _part(self, source: int, target: int, part: ByteRange, report: Report) -> None:
        whole = part.place % BLOCK == 0 and part.nbytes % BLOCK == 0
        for way in list(self.ways):
            if way in ("reflink", "direct") and not whole or way == "reflink" and part.start % BLOCK:
                continue
            try:
                crc = getattr(self, f"_{way}")(source, target, part)
            except OSError as error:
                if error.errno not in REFUSALS or way == "plain":
                    raise
                with self._lock:
                    if way in self.ways:
                        self.ways.remove(way)
                continue
            report(CopiedRange(part.place, part.nbytes, crc, part.file.name, part.start, way == "reflink"))
            return

    def _reflink(self, source: int, target: int, part: ByteRange) -> None:
        fcntl.ioctl(target, FICLONERANGE, struct.pack("qQQQ", source, part.start, part.nbytes, part.place))

    def _direct(self, source: int, target: int, part: ByteRange) -> int:
        lead = part.start % BLOCK
        size = part.nbytes + (BLOCK if lead else 0)
        if not hasattr(self._own, "buffers"):
            self._own.buffers = mmap.mmap(-1, CHUNK + BLOCK), mmap.mmap(-1, CHUNK)
        first, second = (memoryview(buffer) for buffer in self._own.buffers)
        with naming(part.file):
            got = os.preadv(self._reopen(source, os.O_RDONLY), [first[:size]], part.start - lead)
        if got < lead + part.nbytes:
            raise OSError(errno.EINVAL, "a short read")  # the file ends here, or the way does not carry: let another one tell
        data = first[: part.nbytes]
        if lead:  # the bytes have another place in their block now
            data = second[: part.nbytes]
            data[:] = first[lead : lead + part.nbytes]
        if os.pwrite(self._reopen(target, os.O_WRONLY), data, part.place) < part.nbytes:
            raise OSError(errno.EINVAL, "a short write")
        return zlib.crc32(data)

    def _kernel(self, source: int, target: int, part: ByteRange) -> None:
        if not hasattr(os, "copy_file_range"):
            raise OSError(errno.ENOSYS, "no copy_file_range")
        done = 0
        while done < part.nbytes:
            moved = os.copy_file_range(source, target, part.nbytes - done, part.start + done, part.place + done)
            if moved == 0:
                raise OSError(errno.EINVAL, "a short copy")
            done += moved

    def _plain(self, source: int, target: int, part: ByteRange) -> int:
        with naming(part.file):
            data = read_exactly(source, part.nbytes, part.start)
        write_all(target, data, part.place)
        return zlib.crc32(data)

    def _reopen(self, descriptor: int, flags: int) -> int:
        """The file behind a descriptor, opened past the page cache; not by its name, which may mean another file by now."""
        with self._lock:
            if (descriptor, flags) not in self._reopened:
                if not hasattr(os, "O_DIRECT"):
                    raise OSError(errno.ENOSYS, "no O_DIRECT")
                self._reopened[descriptor, flags] = os.open(f"/proc/self/fd/{descriptor}", flags | os.O_DIRECT)
            return self._reopened[descriptor, flags]


def chunks(byte_range: ByteRange) -> Iterator[ByteRange]:
    """The range cut where blocks of the target begin, so that all parts but the first and the last are whole blocks."""
    done = 0
    while done < byte_range.nbytes:
        place, left = byte_range.place + done, byte_range.nbytes - done
        if place % BLOCK:
            size = min(left, -place % BLOCK)
        else:
            size = min(left, CHUNK) if left < BLOCK else min(left // BLOCK * BLOCK, CHUNK)
        yield ByteRange(byte_range.file, byte_range.start + done, size, place)
        done += size


def write_all(descriptor: int, data: bytes | bytearray | memoryview, place: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], place + done)
