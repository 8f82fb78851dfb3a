"""Reads the header of a safetensors file strictly.

The library's own reader accepts files that a converter must refuse (duplicate names, any alignment), and does not tell where
the bytes of a tensor lie. Format: u64 little-endian length N, N bytes of JSON, then the data.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit.bounded import check_ordinary, open_ordinary
from upfit.errors import UpfitError

# Bytes an element. Sub-byte types belong to quantised checkpoints, which are refused before a header is read.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 32 * 2**20  # the largest known mixture-of-experts shard has 0.4 MB
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 16  # as many as the deepest known tensors have, twice over
MAX_DIMENSION = 2**63 - 1  # what torch counts with


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `start` and `end` are offsets from the beginning of `file`, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of `path` in the order of their bytes.

    Raises UpfitError when the header is too large, is not what the format demands, or does not cover the file exactly.
    """
    size = check_ordinary(path).st_size
    with open_ordinary(path) as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise UpfitError(f"{path} is cut short: its header claims {length} bytes, the file has {size}; fetch it again")
        if length > MAX_HEADER_BYTES:
            raise UpfitError(f"{path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        content = file.read(length)
    header = _parse(path, content)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UpfitError(f"{path} has a damaged safetensors header (__metadata__ is not text by name); fetch it again")
    if len(header) > MAX_TENSORS:
        raise UpfitError(f"{path} lists {len(header)} tensors; at most {MAX_TENSORS} are read")
    infos = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_coverage(path, infos, 8 + length, size)
    return infos


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form part of a safetensors header, whose tensors `read_header` has checked."""
    with open_ordinary(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = _parse(path, file.read(min(size, MAX_HEADER_BYTES)))
    return dict(header.get("__metadata__") or {})


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UpfitError(f"{path} has a damaged safetensors header ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise UpfitError(f"{path} has a damaged safetensors header (not an object); fetch it again")
    return header


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    def natural(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise UpfitError(f"{path}: tensor {name!r} has no dtype, shape and two data_offsets; fetch the file again") from error
    if isinstance(dtype, str) and dtype not in ITEM_BYTES and dtype.startswith(("F4", "F6", "F8", "I4", "U4")):
        raise UpfitError(f"{path} is quantised ({name} is stored as {dtype}); convert the checkpoint it was made from")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UpfitError(f"{path}: tensor {name!r} has dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or not all(map(natural, [*shape, begin, end])):
        raise UpfitError(f"{path}: tensor {name!r} has a shape or offsets that are not natural numbers; fetch the file again")
    if len(shape) > MAX_DIMENSIONS:
        raise UpfitError(f"{path}: tensor {name!r} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if end - begin != _bytes_of(shape, ITEM_BYTES[dtype], end - begin):
        needed = f"its shape {_short(shape)} and {dtype} need another number"
        raise UpfitError(f"{path}: tensor {_short(name)} has {_short(end - begin)} bytes, {needed}")
    return TensorInfo(name, dtype, tuple(shape), path, base + begin, base + end)


def _bytes_of(shape: list[int], itemsize: int, most: int) -> int | None:
    """Bytes of a tensor; None where they are more than `most`, without multiplying numbers that have no end."""
    if 0 in shape:
        return 0 if max(shape) <= MAX_DIMENSION else None
    nbytes = itemsize
    for size in shape:
        if size > most:
            return None
        nbytes *= size
        if nbytes > most:
            return None
    return nbytes


def _short(value: object) -> str:
    """What a message shows of something that may have thousands of digits."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of so many digits
        text = "a number without end"
    return text if len(text) <= 120 else text[:100] + " ..."


def _check_coverage(path: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    """Tensors must follow each other without a gap or an overlap and end where the file ends."""
    position = base
    for info in infos:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise UpfitError(f"{path}: tensor {info.name!r} {what}; fetch the file again")
        position = info.end
    if position != size:
        what = "is cut short" if position > size else "has bytes that no tensor owns"
        raise UpfitError(f"{path} {what}: its tensors end at byte {position}, the file at {size}; fetch it again")


def encode_header(
    infos: list[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str], block: int = 8, phase: int = 0
) -> bytes:
    """Length and header of a file holding (name, dtype, shape, bytes) in this order, padded with spaces so that the data begins
    at `phase` modulo `block` bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, nbytes in infos:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    content = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    content += b" " * ((phase - 8 - len(content)) % block)
    return len(content).to_bytes(8, "little") + content


def read_exactly(descriptor: int, nbytes: int, offset: int) -> bytearray:
    """`nbytes` from `offset`; raises UpfitError when the file ends before (it was changed while it was read)."""
    buffer = bytearray(nbytes)
    view, done = memoryview(buffer), 0
    while done < nbytes:
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise UpfitError("a source file became shorter while it was read; start again on a folder at rest")
        done += got
    return buffer
