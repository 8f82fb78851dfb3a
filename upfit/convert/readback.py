"""Reads back what was written: each piece against its checksum, or against the source's bytes where nobody saw them move.

A copy that went wrong between the disks (a flipped bit, a block that was never written) loads as well as a right one.
"""

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from upfit.convert.movers import Piece
from upfit.convert.safetensors_file import read_exactly
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.convert.writer import Shard

STEP = 2**20
WORKERS = 4  # the disk is asked for the next pieces while one is compared
Read = Callable[[str, int, int], bytes | bytearray]  # bytes of a source file: its name, how many, from where


def same(descriptor: int, piece: Piece, read: Read) -> bool:
    """Whether a piece of an open file has the bytes it should have: its checksum, or the source's bytes."""
    crc = 0
    for done in range(0, piece.nbytes, STEP):
        size = min(STEP, piece.nbytes - done)
        data = read_exactly(descriptor, size, piece.place + done)
        if piece.crc is None and piece.file is not None and data != read(piece.file, size, piece.start + done):
            return False
        crc = zlib.crc32(data, crc)
    return piece.crc is None or crc == piece.crc


def check_written(folder: Path, shards: "list[Shard]", read: Read, advance: Callable[[int], None]) -> None:
    """Compare all that this run has written into `folder`; `advance` is told bytes as they go.

    Blocks that are shared with the source are the source's and are not read. Raises UpfitError for the first difference.
    """
    for shard in (shard for shard in shards if shard.pieces):
        descriptor = os.open(folder / shard.name, os.O_RDONLY)
        try:
            _let_go(descriptor)
            with ThreadPoolExecutor(WORKERS) as pool:
                compared = {pool.submit(same, descriptor, one, read): one for one in shard.pieces if not one.shared}
                for future, piece in compared.items():
                    if not future.result():
                        pool.shutdown(cancel_futures=True)
                        raise UpfitError(_difference(shard, piece))
                    advance(piece.nbytes)
        finally:
            os.close(descriptor)


def _let_go(descriptor: int) -> None:
    """Have the file read from its disk, not from the memory that it was written from."""
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _difference(shard: "Shard", piece: Piece) -> str:
    before = [name for name, place in shard.offsets.items() if place <= piece.place]
    name = max(before, key=lambda name: shard.offsets[name], default="its header")
    return (
        f"the result failed its check and was not kept: {shard.name}, read back, has other bytes than were written, in {name} "
        "or behind it; memory or the disk may be failing, so try again on another"
    )
