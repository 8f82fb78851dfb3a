"""Writes token shards (see shards.py), one document after the other; after a kill the writer continues where it was."""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upfit.durable import sync_path
from upfit.errors import UpfitError
from upfit.uptrain.data.shards import BLOCK_BYTES, DOCUMENTS, FORMAT, MANIFEST, OFFSET_DTYPE, READ_BYTES, TOKEN_DTYPES

SHARD_TOKENS = 2**28  # half a gigabyte, or one with ids of 4 bytes


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


class FileWriter:
    """A file that only grows, and the checksums of what is in it."""

    def __init__(self, path: Path, block: int) -> None:
        self.path, self.block, self.bytes = path, block, 0
        self._sha256, self._blocks, self._crc32 = hashlib.sha256(), "", 0

    def append(self, content: bytes) -> None:
        with open(self.path, "ab") as file:
            file.write(content)
        self._count(content)

    def _count(self, content: bytes) -> None:
        self._sha256.update(content)
        rest = memoryview(content)
        while rest:
            piece = rest[: self.block - self.bytes % self.block]
            self._crc32, self.bytes = zlib.crc32(piece, self._crc32), self.bytes + len(piece)
            if self.bytes % self.block == 0:
                self._blocks, self._crc32 = f"{self._blocks}{self._crc32:08x}", 0
            rest = rest[len(piece) :]

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this file; crc32 in eight hexadecimal digits for each block."""
        begun = f"{self._crc32:08x}" if self.bytes % self.block else ""
        return {"bytes": self.bytes, "sha256": self._sha256.hexdigest(), "crc32": self._blocks + begun}

    def go_on(self, entry: dict[str, Any]) -> None:
        """Cut the file to what it held when `entry` was told of it. Raises UpfitError when that is not there any more."""
        if self.path.is_file():
            os.truncate(self.path, min(entry["bytes"], self.path.stat().st_size))
            with open(self.path, "rb") as file:
                while content := file.read(READ_BYTES):
                    self._count(content)
        if self.entry() != entry:
            raise UpfitError(f"{self.path} is not what was written there; remove {self.path.parent.parent} and start anew")


class ShardWriter:
    """Writes documents into `folder` one after the other; `finish` writes the manifest. Memory use does not grow."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int = SHARD_TOKENS, block_bytes: int = BLOCK_BYTES) -> None:
        self.folder, self.dtype, self.shard_tokens, self.block_bytes = folder, dtype, shard_tokens, block_bytes
        self.tokens, self.documents, self.largest = 0, 0, 0
        self.finished: dict[str, dict[str, Any]] = {}  # shards that are full, as the manifest tells of them
        self._documents, self._shard = self._file(DOCUMENTS), self._file("tokens-00000.bin")

    def _file(self, name: str) -> FileWriter:
        return FileWriter(self.folder / name, self.block_bytes)

    def add(self, ids: Sequence[int]) -> None:
        """Append one document of at least one token."""
        self.extend(np.asarray(ids, dtype=TOKEN_DTYPES[self.dtype]), np.array([len(ids)]))

    def extend(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of `lengths` tokens each (at least one), their `ids` [Σ lengths] one after the other."""
        if not len(ids):
            return
        starts = self.tokens + np.cumsum(lengths) - lengths
        self._documents.append(starts.astype(OFFSET_DTYPE).tobytes())
        self.tokens, self.documents = self.tokens + len(ids), self.documents + len(lengths)
        self.largest = max(self.largest, int(ids.max()))
        size = TOKEN_DTYPES[self.dtype].itemsize
        while len(ids):
            room = self.shard_tokens - self._shard.bytes // size
            self._shard.append(ids[:room].astype(TOKEN_DTYPES[self.dtype]).tobytes())
            if self._shard.bytes == self.shard_tokens * size:
                sync_path(self._shard.path)
                self.finished[self._shard.path.name] = self._shard.entry()
                self._shard = self._file(f"tokens-{len(self.finished):05d}.bin")
            ids = ids[room:]

    def state(self) -> dict[str, Any]:
        """All that `go_on` needs; what it tells of is on the disk."""
        begun = [file for file in (self._documents, self._shard) if file.bytes]
        for file in begun:
            sync_path(file.path)
        counts = {"tokens": self.tokens, "documents": self.documents, "largest": self.largest}
        return {**counts, "finished": self.finished, "begun": {file.path.name: file.entry() for file in begun}}

    def go_on(self, state: dict[str, Any]) -> None:
        """Take up the work of a writer that told `state`; what it wrote after that is cut off."""
        self.tokens, self.documents, self.largest = state["tokens"], state["documents"], state["largest"]
        self.finished = state["finished"]
        self._shard = self._file(f"tokens-{len(self.finished):05d}.bin")
        for file in (self._documents, self._shard):
            if file.path.name in state["begun"]:
                file.go_on(state["begun"][file.path.name])
        for path in self.folder.iterdir():
            if path.name not in (*self.finished, *state["begun"]):
                path.unlink()

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest with `about` (tokenizer, sources) added; the manifest."""
        self._documents.append(np.array([self.tokens], dtype=OFFSET_DTYPE).tobytes())
        files = dict(self.finished)
        for file in (self._documents, self._shard):
            if file.bytes:
                files[file.path.name] = file.entry()
        counts = {"tokens": self.tokens, "documents": self.documents, "largest_id": self.largest, "dtype": self.dtype}
        manifest = {"format": FORMAT, **about, **counts, "block_bytes": self.block_bytes, "files": dict(sorted(files.items()))}
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return manifest
