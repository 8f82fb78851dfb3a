"""A file beside the shards that lists those which are finished, so that the same command continues after a kill.

The first line says which conversion it is. Each further line is a shard whose bytes are on the disk, with the checksums of its
pieces. A shard that has no line, or other bytes than its line says, is written again.
"""

import functools
import json
import os
import shutil
import threading
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upfit.checkpoint.copy_bytes import CopiedRange
from upfit.checkpoint.read_back import STEP, Read, same
from upfit.checkpoint.safetensors_header import read_exactly
from upfit.errors import UpfitError

JOURNAL = "conversion.jsonl"  # in a folder that is being written: what of it is finished


class FinishedShards:
    """`verified` names the shards in `folder` that an earlier run has finished and that are still what it wrote."""

    def __init__(self, folder: Path, settings: dict[str, Any], read: Read) -> None:
        """Go on with the work in `folder` if it was begun with these settings, else clear it and begin."""
        self.path, self._lock = folder / JOURNAL, threading.Lock()
        first = json.dumps(settings, sort_keys=True)
        lines = self._lines()
        finished = lines[1:] if lines[:1] == [first] else []
        records = {line["name"]: line for line in map(_parsed, finished) if line}
        self.verified = {name: line["nbytes"] for name, line in records.items() if _stands(folder / name, line, read)}
        for path in folder.iterdir():
            if path.name not in self.verified and path != self.path:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        begun = self.path.with_name(f"{JOURNAL}.new")
        begun.write_text("".join(line + "\n" for line in [first, *(json.dumps(records[name]) for name in self.verified)]))
        os.replace(begun, self.path)

    def _lines(self) -> list[str]:
        """Whole lines only: a kill may have cut the last one."""
        if not self.path.exists():
            return []
        return [line[:-1] for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]

    def add(self, name: str, nbytes: int, pieces: list[CopiedRange]) -> None:
        """Tell of a shard; its bytes must have reached the disk."""
        line = {"name": name, "nbytes": nbytes, "pieces": [list(asdict(piece).values()) for piece in pieces]}
        with self._lock, open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    """A line as it was written; None for one that was damaged since."""
    try:
        record = json.loads(line)
        return {
            "name": str(record["name"]),
            "nbytes": int(record["nbytes"]),
            "pieces": [list(piece) for piece in record["pieces"]],
        }
    except (ValueError, KeyError, TypeError):
        return None


def _stands(path: Path, line: dict[str, Any], read: Read) -> bool:
    """Whether the shard still has the bytes that its line tells: every one of them is read."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != line["nbytes"]:
        return False
    pieces = sorted((CopiedRange(*entry) for entry in line["pieces"]), key=lambda piece: piece.place)
    end = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for piece in pieces:
            if piece.place != end or not same(functools.partial(_take, descriptor), piece, read):
                return False
            end += piece.nbytes
    except UpfitError:  # the source's file has become shorter
        return False
    finally:
        os.close(descriptor)
    return end == line["nbytes"]


def _take(descriptor: int, nbytes: int, place: int) -> bytearray:
    return read_exactly(descriptor, nbytes, place)


def crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(STEP):
            crc = zlib.crc32(data, crc)
    return crc
