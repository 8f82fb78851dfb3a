"""Token shards: flat files of token ids, memory-mapped and addressed by integers only.

    tokens-00000.bin ...  token ids, little-endian uint16 (vocabularies up to 65536) or uint32
    documents.bin         int64, the position of the first token of each document, then the number of tokens
    manifest.json         what made them: tokenizer, counts, dtype; size, sha256 and the crc32 of every block of every file

There is no state and nothing is padded: `rows.py` tells which tokens a step takes. Manifests of format 1 have no crc32: of
their files only the sizes are compared, unless `verify` is asked for.
"""

import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from upfit.bounded import check_ordinary, open_ordinary, read_json, shaped
from upfit.errors import UpfitError

MANIFEST, DOCUMENTS = "manifest.json", "documents.bin"
FORMAT = 2
# Rows are read at random: the first of a block costs reading all of it, and a checksum takes ten characters of the manifest.
BLOCK_BYTES = 2**18
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_DTYPE = np.dtype("<i8")
READ_BYTES = 2**24  # at a time, where a checksum is taken
MANIFEST_BYTES = 256 * 2**20  # checksums of 6 TB of tokens
HEX = re.compile(r"[0-9a-f]*")


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
            size = check_ordinary(path).st_size if path.exists() else None
            if size != entry["bytes"]:
                raise UpfitError(f"{path} has {size} bytes, its manifest says {entry['bytes']}; run upfit prepare again")
        dtype = TOKEN_DTYPES[self.manifest["dtype"]]
        names = sorted(name for name in self.manifest["files"] if name.startswith("tokens-"))
        self._files = [self._open(name, dtype) for name in names]
        self._ends = np.cumsum([len(file) for file in self._files])
        documents = self._open(DOCUMENTS, OFFSET_DTYPE)
        self._starts = documents.read(0, len(documents))
        if self._starts[0] != 0 or (np.diff(self._starts) < 0).any():
            raise UpfitError(f"{folder / DOCUMENTS} holds no positions of documents; run upfit prepare again")
        self.tokens = int(self._ends[-1])
        if self.tokens != self.manifest["tokens"] or self._starts[-1] != self.tokens:
            raise UpfitError(
                f"{folder} holds {self.tokens} tokens, its manifest says {self.manifest['tokens']}; prepare it again"
            )

    def _open(self, name: str, dtype: np.dtype[Any]) -> CheckedFile:
        entry = self.manifest["files"][name]
        return CheckedFile(self.folder / name, dtype, entry.get("crc32"), self.manifest.get("block_bytes", BLOCK_BYTES))

    @property
    def tokenizer(self) -> tuple[str, str]:
        """Hash and name of the tokenizer that made the tokens. Raises UpfitError where the manifest does not tell them."""
        tokenizer = self.manifest.get("tokenizer")
        parts = [tokenizer.get(key) for key in ("sha256", "name")] if isinstance(tokenizer, dict) else []
        if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise UpfitError(f"{self.folder / MANIFEST} does not name the tokenizer; run upfit prepare again")
        return str(parts[0]), str(parts[1])

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
            with open_ordinary(self.folder / name) as file:
                while content := file.read(READ_BYTES):
                    digest.update(content)
            if digest.hexdigest() != entry["sha256"]:
                raise UpfitError(
                    f"{self.folder / name} is damaged: its SHA-256 is not that of {MANIFEST}; "
                    "copy the file again, or run upfit prepare again"
                )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        places = f"{folder} TOKENS" if folder.exists() else f"TEXT {folder}"  # what is there may be the text itself
        raise UpfitError(f"{folder} has no {MANIFEST}; make token shards with upfit prepare {places} --tokenizer MODEL")
    manifest = read_json(path, MANIFEST_BYTES)
    with shaped(f"{path} is not a manifest of format 1 or {FORMAT}; run upfit prepare again"):
        _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, or what taking apart something else raises, for what `upfit prepare` does not write."""
    files = manifest["files"]
    if not isinstance(manifest["format"], int) or manifest["format"] not in (1, FORMAT):
        raise ValueError("its format is not known")
    if manifest["dtype"] not in TOKEN_DTYPES or not all(map(_is_count, (manifest["tokens"], manifest["largest_id"]))):
        raise ValueError("its dtype, tokens or largest_id are none")
    if DOCUMENTS not in files or not any(name.startswith("tokens-") for name in files) or manifest["tokens"] == 0:
        raise ValueError("it names no tokens")
    for name, entry in files.items():
        if Path(name).name != name or not _is_entry(manifest, name, entry):
            raise ValueError(f"of {name!r} it does not tell what is needed")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_entry(manifest: dict[str, Any], name: str, entry: dict[str, Any]) -> bool:
    item = (OFFSET_DTYPE if name == DOCUMENTS else TOKEN_DTYPES[manifest["dtype"]]).itemsize
    if not _is_count(entry["bytes"]) or entry["bytes"] == 0 or entry["bytes"] % item or not isinstance(entry["sha256"], str):
        return False
    if manifest["format"] == 1:
        return True
    block = manifest["block_bytes"]
    if not _is_count(block) or block == 0 or block % item:
        return False
    return len(entry["crc32"]) == 8 * -(-entry["bytes"] // block) and bool(HEX.fullmatch(entry["crc32"]))
