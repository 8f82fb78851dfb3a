"""metrics.jsonl: a line for every step."""

import os
from pathlib import Path


class MetricsFile:
    """The file `path`, to which whole lines are appended; None (every process but the first) keeps nothing.

    Lines that do not fit on a full disk wait in memory. The file is opened for each line, so that it may be replaced in
    between.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.waiting = b""

    def append(self, line: str) -> None:
        """Raises OSError when the line, or a part of it, has to wait."""
        if self.path is not None:
            self.waiting += line.encode() + b"\n"
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Write what waits; with `sync` it is on the disk afterwards. Raises OSError."""
        if self.path is None:
            return
        with open(self.path, "ab", buffering=0) as file:
            while self.waiting:
                self.waiting = self.waiting[file.write(self.waiting) :]
            if sync:
                os.fsync(file.fileno())
