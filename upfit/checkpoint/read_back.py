"""Reads back what was written: each piece is compared with its checksum or, where it has none, with the source's bytes.

A wrong copy (a flipped bit, a block that was never written) would load just as a right one does.
"""

import mmap
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from upfit.checkpoint.copy_bytes import BLOCK, REFUSALS, CopiedRange
from upfit.checkpoint.safetensors_header import read_exactly
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.checkpoint.reader import Checkpoint
    from upfit.checkpoint.shard import Shard

STEP = 2**20  # bytes compared at a time
EDGE = 256  # bytes looked at on each end of a tensor
WORKERS = 4  # the disk is asked for the next pieces while one is compared
Take = Callable[[int, int], bytearray | memoryview]  # bytes of a written file: how many, from where
Read = Callable[[str, int, int], bytes | bytearray]  # bytes of a source file: its name, how many, from where


def same(take: Take, piece: CopiedRange, read: Read) -> bool:
    """Whether a piece of a written file, which `take` reads, has the bytes it should have: its checksum, or the source's."""
    crc = 0
    for done in range(0, piece.nbytes, STEP):
        size = min(STEP, piece.nbytes - done)
        data = take(size, piece.place + done)
        if piece.crc is None and piece.file is not None and bytes(data) != read(piece.file, size, piece.start + done):
            return False
        crc = zlib.crc32(data, crc)
    return piece.crc is None or crc == piece.crc


def check_written(folder: Path, shards: "list[Shard]", read: Read, advance: Callable[[int], None]) -> None:
    """Compare all that this run has written into `folder`; `advance` is told bytes as they go.

    Blocks that are shared with the source are the source's and are not read. Raises UpfitError for the first difference.
    """
    for shard in (shard for shard in shards if shard.pieces):
        with Disk(folder / shard.name) as disk, ThreadPoolExecutor(WORKERS) as pool:
            compared = {pool.submit(same, disk.take, one, read): one for one in shard.pieces if not one.shared}
            try:
                for future, piece in compared.items():
                    if not future.result():
                        raise UpfitError(_difference(shard, piece))
                    advance(piece.nbytes)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


class Disk:
    """A file read from the disk and not from memory that still holds what was written: past the page cache where possible."""

    def __init__(self, path: Path) -> None:
        self.path, self._own = path, threading.local()

    def __enter__(self) -> "Disk":
        self.plain = os.open(self.path, os.O_RDONLY)
        os.fsync(self.plain)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.plain, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            self.direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except (OSError, AttributeError):  # a file system or a system without it
            self.direct = -1
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in {self.plain, self.direct} - {-1}:
            os.close(descriptor)

    def take(self, nbytes: int, place: int) -> bytearray | memoryview:
        """At most STEP bytes from `place`, valid until this thread takes others."""
        lead = place % BLOCK
        whole = -(-(lead + nbytes) // BLOCK) * BLOCK
        if self.direct != -1:
            if not hasattr(self._own, "buffer"):
                self._own.buffer = memoryview(mmap.mmap(-1, STEP + 2 * BLOCK))
            try:
                if os.preadv(self.direct, [self._own.buffer[:whole]], place - lead) >= lead + nbytes:
                    return self._own.buffer[lead : lead + nbytes]
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
        return read_exactly(self.plain, nbytes, place)


def check_places(folder: Path, shards: "list[Shard]", checkpoint: "Checkpoint") -> None:
    """Compare both ends of every untouched tensor with the source's: checksums tell that the bytes which were read arrived, and
    this that they were the tensor's. Raises UpfitError for the first that is another one."""
    for shard in shards:
        with open(folder / shard.name, "rb") as file:
            for item in (item for item in shard.items if item.untouched):
                info, place = checkpoint.info(item.source), shard.offsets[item.name]
                for start in (0, max(item.nbytes - EDGE, 0)):
                    size = min(EDGE, item.nbytes)
                    written = read_exactly(file.fileno(), size, place + start)
                    if written != read_exactly(checkpoint.descriptor(info.file), size, info.start + start):
                        raise UpfitError(f"the result failed its check and was not kept: {item.name} is not the source's")


def _difference(shard: "Shard", piece: CopiedRange) -> str:
    before = [name for name, place in shard.offsets.items() if place <= piece.place]
    name = max(before, key=lambda name: shard.offsets[name], default="its header")
    return (
        f"the result failed its check and was not kept: {shard.name}, read back, has other bytes than were written, in {name} "
        "or behind it; memory or the disk may be failing, so try again on another"
    )
