"""Token shards: flat files of token ids, memory-mapped and addressed by integers only.

    tokens-00000.bin ...  token ids, little-endian uint16 (vocabularies up to 65536) or uint32
    documents.bin         int64, the position of the first token of each document, then the number of tokens
    manifest.json         what made them: tokenizer, counts, dtype; size, sha256 and the crc32 of every block of every file

There is no state and nothing is padded: `rows.py` tells which tokens a step takes. Manifests of format 1 have no crc32: of
their files only the sizes are compared, unless `verify` is asked for.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from upfit.errors import UpfitError

MANIFEST, DOCUMENTS = "manifest.json", "documents.bin"
FORMAT = 2
# Rows are read at random: the first of a block costs reading all of it, and a checksum takes ten characters of the manifest.
BLOCK_BYTES = 2**18
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_DTYPE = np.dtype("<i8")
READ_BYTES = 2**24


class CheckedFile:
    """A file mapped into memory. Each block is compared with its checksum when something of it is read for the first time."""

    def __init__(self, path: Path, dtype: np.dtype[Any], crc32: str | None, block: int) -> None:
        self.path, self.block = path, block
        self.data: np.ndarray = np.memmap(path, dtype=dtype, mode="r")
        self._bytes = self.data.view(np.uint8)
        self._wanted = np.array([int(crc32[at : at + 8], 16) for at in range(0, len(crc32 or ""), 8)] if crc32 else [])
        self._unchecked = np.ones(len(self._wanted), dtype=bool)

    def __len__(self) -> int:
        return len(self.data)

    def read(self, start: int, end: int) -> np.ndarray:
        """The items start … end − 1. Raises UpfitError when they are not what was written."""
        size = self.data.itemsize
        first, last = start * size // self.block, -(-end * size // self.block)
        for index in first + np.flatnonzero(self._unchecked[first:last]):
            at = int(index) * self.block
            if zlib.crc32(self._bytes[at : at + self.block].data) != self._wanted[index]:
                length = min(self.block, len(self._bytes) - at)
                raise UpfitError(
                    f"{self.path} is damaged in the {length} bytes from offset {at}: they are not what upfit prepare wrote; "
                    "copy the file again, or run upfit prepare again"
                )
            self._unchecked[index] = False
        return self.data[start:end]


class Shards:
    """An opened folder of token shards.

    Raises UpfitError when the manifest is missing or damaged or a file has another size than it says. Tokens are compared with
    their checksums as they are read; the documents' positions, which are searched, at once.
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
        self._files = [self._open(name, dtype) for name in names]
        self._ends = np.cumsum([len(file) for file in self._files])
        documents = self._open(DOCUMENTS, OFFSET_DTYPE)
        self._starts = documents.read(0, len(documents))
        self.tokens = int(self._ends[-1])
        if self.tokens != self.manifest["tokens"] or self._starts[-1] != self.tokens:
            raise UpfitError(
                f"{folder} holds {self.tokens} tokens, its manifest says {self.manifest['tokens']}; prepare it again"
            )

    def _open(self, name: str, dtype: np.dtype[Any]) -> CheckedFile:
        entry = self.manifest["files"][name]
        return CheckedFile(self.folder / name, dtype, entry.get("crc32"), self.manifest.get("block_bytes", BLOCK_BYTES))

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens: a hash over the files' hashes."""
        hashes = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def read(self, start: int, end: int) -> np.ndarray:
        """Token ids [end − start], int64, from any number of files. Raises UpfitError when they are damaged."""
        parts = []
        for file, file_end in zip(self._files, self._ends, strict=True):
            file_start = int(file_end) - len(file)
            if file_start < end and start < file_end:
                parts.append(file.read(max(start - file_start, 0), min(end - file_start, len(file))))
        return np.concatenate(parts).astype(np.int64)

    def document_starts(self, start: int, end: int) -> np.ndarray:
        """Positions in start … end − 1 at which a document begins, relative to `start`."""
        first, last = np.searchsorted(self._starts[:-1], [start, end])
        return np.asarray(self._starts[first:last]) - start

    def verify(self) -> None:
        """Read every byte of every file; raises UpfitError for a file that has not the SHA-256 it was written with."""
        for name, entry in self.manifest["files"].items():
            digest = hashlib.sha256()
            with open(self.folder / name, "rb") as file:
                while content := file.read(READ_BYTES):
                    digest.update(content)
            if digest.hexdigest() != entry["sha256"]:
                raise UpfitError(
                    f"{self.folder / name} is damaged: its SHA-256 is not that of {MANIFEST}; "
                    "copy the file again, or run upfit prepare again"
                )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UpfitError(f"{folder} has no {MANIFEST}; make token shards with upfit prepare TEXT {folder} --tokenizer MODEL")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] in (1, FORMAT) and manifest["dtype"] in TOKEN_DTYPES and manifest["tokens"] > 0
        known = known and isinstance(manifest["largest_id"], int)
        known = known and all(_is_entry(manifest, entry) for entry in manifest["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise UpfitError(f"{path} is not a manifest of format 1 or {FORMAT}; run upfit prepare again")
    return manifest


def _is_entry(manifest: dict[str, Any], entry: dict[str, Any]) -> bool:
    if manifest["format"] == 1:
        return {"bytes", "sha256"} <= set(entry)
    blocks = -(-entry["bytes"] // manifest["block_bytes"])
    return len(bytes.fromhex(entry["crc32"])) == 4 * blocks and "sha256" in entry
