"""Token shards: flat files of token ids, memory-mapped and addressed by integers only.

    tokens-00000.bin ...  token ids, little-endian uint16 (vocabularies up to 65536) or uint32
    documents.bin         int64, the position of the first token of each document, then the number of tokens
    manifest.json         what made them: tokenizer, counts, dtype, size and sha256 of every file

There is no state and nothing is padded: `rows.py` tells which tokens a step takes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upfit.errors import UpfitError

MANIFEST, DOCUMENTS = "manifest.json", "documents.bin"
FORMAT = 1
SHARD_TOKENS = 2**28
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_DTYPE = np.dtype("<i8")


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


class ShardWriter:
    """Writes documents into `folder` one after the other; `finish` writes the manifest. Memory use does not grow."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.tokens, self.documents, self.largest = 0, 0, 0
        self.files: dict[str, dict[str, Any]] = {}
        self._hashes: dict[str, Any] = {}
        self._in_shard, self._shards = 0, 0

    def add(self, ids: Sequence[int]) -> None:
        """Append one document of at least one token."""
        self._append(DOCUMENTS, np.array([self.tokens], dtype=OFFSET_DTYPE))
        data = np.asarray(ids, dtype=TOKEN_DTYPES[self.dtype])
        while len(data):
            room = self.shard_tokens - self._in_shard
            self._append(f"tokens-{self._shards:05d}.bin", data[:room])
            self._in_shard += len(data[:room])
            if self._in_shard == self.shard_tokens:
                self._shards, self._in_shard = self._shards + 1, 0
            data = data[room:]
        self.tokens, self.documents = self.tokens + len(ids), self.documents + 1
        self.largest = max(self.largest, max(ids))

    def _append(self, name: str, data: np.ndarray) -> None:
        content = data.tobytes()
        with open(self.folder / name, "ab") as file:
            file.write(content)
        self._hashes.setdefault(name, hashlib.sha256()).update(content)
        entry = self.files.setdefault(name, {"bytes": 0})
        entry["bytes"] += len(content)

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest with `about` (tokenizer, sources) added; the manifest."""
        self._append(DOCUMENTS, np.array([self.tokens], dtype=OFFSET_DTYPE))
        for name, entry in self.files.items():
            entry["sha256"] = self._hashes[name].hexdigest()
        counts = {"tokens": self.tokens, "documents": self.documents, "largest_id": self.largest, "dtype": self.dtype}
        manifest = {"format": FORMAT, **about, **counts, "files": dict(sorted(self.files.items()))}
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return manifest


class Shards:
    """An opened folder of token shards.

    Raises UpfitError when the manifest is missing or damaged or a file has another size than it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        for name, entry in self.manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if Path(name).name != name or size != entry["bytes"]:
                raise UpfitError(f"{path} has {size} bytes, its manifest says {entry['bytes']}; run upfit prepare again")
        dtype = TOKEN_DTYPES[self.manifest["dtype"]]
        names = sorted(name for name in self.manifest["files"] if name.startswith("tokens-"))
        self._files = [np.memmap(folder / name, dtype=dtype, mode="r") for name in names]
        self._ends = np.cumsum([len(file) for file in self._files])
        self._starts = np.memmap(folder / DOCUMENTS, dtype=OFFSET_DTYPE, mode="r")
        self.tokens = int(self._ends[-1])
        if self.tokens != self.manifest["tokens"] or self._starts[-1] != self.tokens:
            raise UpfitError(
                f"{folder} holds {self.tokens} tokens, its manifest says {self.manifest['tokens']}; prepare it again"
            )

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens: a hash over the files' hashes."""
        hashes = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def read(self, start: int, end: int) -> np.ndarray:
        """Token ids [end − start], int64, from any number of files."""
        parts = []
        for file, file_end in zip(self._files, self._ends, strict=True):
            file_start = int(file_end) - len(file)
            if file_start < end and start < file_end:
                parts.append(file[max(start - file_start, 0) : end - file_start])
        return np.concatenate(parts).astype(np.int64)

    def document_starts(self, start: int, end: int) -> np.ndarray:
        """Positions in start … end − 1 at which a document begins, relative to `start`."""
        first, last = np.searchsorted(self._starts[:-1], [start, end])
        return np.asarray(self._starts[first:last]) - start


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UpfitError(f"{folder} has no {MANIFEST}; make token shards with upfit prepare TEXT {folder} --tokenizer MODEL")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and manifest["dtype"] in TOKEN_DTYPES and manifest["tokens"] > 0
        known = known and isinstance(manifest["largest_id"], int)
        known = known and all({"bytes", "sha256"} <= set(entry) for entry in manifest["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise UpfitError(f"{path} is not a manifest of format {FORMAT}; run upfit prepare again")
    return manifest
