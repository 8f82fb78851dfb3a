"""Tells whether a file is still the one that was looked at: by its status in the file system, and by samples of its bytes.

Nobody can set a file's change time (ctime), so rewriting it in place shows, even with the old size and time. Samples tell apart
files that look alike after a copy, on another disk, or from a backup.
"""

import hashlib
import os
from dataclasses import astuple, dataclass

SAMPLES = 16  # pieces of a file, beside what the system says of it
SAMPLE_BYTES = 4096  # a page, which a disk reads at once anyway


@dataclass(frozen=True)
class Identity:
    """What the system says of an open file."""

    device: int
    inode: int
    nbytes: int
    changed_ns: int
    status_changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def record(self) -> list[int]:
        return list(astuple(self))


def sampled(descriptor: int) -> str:
    """A hash of the size of an open file and of blocks of it: the first, the last, and others at even distances."""
    size = os.fstat(descriptor).st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - SAMPLE_BYTES, 0)
    for place in sorted({last * step // (SAMPLES - 1) for step in range(SAMPLES)}):
        digest.update(os.pread(descriptor, SAMPLE_BYTES, place))
    return digest.hexdigest()
