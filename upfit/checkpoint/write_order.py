"""The order in which a checkpoint is converted: one file of the source after the other.

While a file is read, its untouched bytes are copied, and the rules run whose last input it holds. So each file of the source is
needed for a short time only, and the shards of the result are finished one by one.
"""

import functools
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from upfit.checkpoint import copy_bytes
from upfit.checkpoint.copy_bytes import ByteCopier, ByteRange, CopiedRange, write_all
from upfit.checkpoint.disk_errors import naming
from upfit.checkpoint.execute import compute, finish
from upfit.checkpoint.finished_shards import FinishedShards
from upfit.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    import torch

    from upfit.checkpoint.execute import Planned
    from upfit.checkpoint.plan import Rule
    from upfit.checkpoint.shard import Shard


class SourceFiles(Protocol):
    """Source files that are downloaded when they are needed."""

    def fetch(self, path: Path) -> None: ...
    def release(self, path: Path) -> None: ...


@dataclass
class OpenShard:
    """A shard that is being written: `left` counts the bytes that are still missing."""

    shard: "Shard"
    path: Path
    descriptor: int
    finished_shards: FinishedShards | None
    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, data: bytes | memoryview, place: int) -> None:
        with naming(self.path):
            write_all(self.descriptor, data, place)
        self.stands(CopiedRange(place, len(data), zlib.crc32(data)))

    def stands(self, piece: CopiedRange) -> None:
        with self.lock:
            self.shard.pieces.append(piece)
            self.left -= piece.nbytes
            finished = self.left == 0
        if finished and self.finished_shards:
            with naming(self.path):
                os.fsync(self.descriptor)
            self.finished_shards.add(self.shard.name, self.shard.nbytes, self.shard.pieces)


@dataclass
class FileStep:
    """What is done while one file of the source is read: its untouched byte ranges, rules whose last tensors it has, and casts.
    `files` are all source files that have to be here, `done` those that nothing needs any more afterwards."""

    file: Path
    ranges: list[tuple[OpenShard, ByteRange]] = field(default_factory=list)
    rules: list["Rule"] = field(default_factory=list)
    casts: list["Planned"] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)
    done: set[Path] = field(default_factory=set)


def file_steps(targets: list[OpenShard], rules: Sequence["Rule"], checkpoint: Checkpoint) -> list[FileStep]:
    """The work, in the order of the source's files; files that nothing is wanted of have no step."""
    by_file = {file: FileStep(file) for file in checkpoint.files}
    order = {file: index for index, file in enumerate(checkpoint.files)}
    wanted = {item.name for target in targets for item in target.shard.items}
    for target in targets:
        for byte_range in _byte_ranges(target.shard, checkpoint):
            by_file[byte_range.file].ranges.append((target, byte_range))
        for item in target.shard.items:
            if item.cast:
                by_file[checkpoint.info(item.source).file].casts.append(item)
    for rule in rules:
        if wanted.intersection(rule.writes):
            read = {file for name in rule.reads for file in checkpoint.files_of(name)}
            files = read & order.keys()  # a fit's own files are always here
            step = by_file[max(files, key=order.__getitem__, default=checkpoint.files[0])]
            step.rules.append(rule)
            step.files |= files
    steps = [step for step in by_file.values() if step.ranges or step.rules or step.casts]
    last: dict[Path, FileStep] = {}
    for step in steps:
        step.files |= {step.file} if step.ranges or step.casts else set()
        last |= dict.fromkeys(step.files, step)
    for file, step in last.items():
        step.done.add(file)
    return steps


def _byte_ranges(shard: "Shard", checkpoint: Checkpoint) -> Iterable[ByteRange]:
    """Untouched tensors as ranges of bytes, neighbours joined."""
    byte_range: ByteRange | None = None
    for item in [item for item in shard.items if item.untouched]:
        info, place = checkpoint.info(item.source), shard.offsets[item.name]
        if byte_range and (byte_range.file, byte_range.start + byte_range.nbytes, byte_range.place + byte_range.nbytes) == (
            info.file,
            info.start,
            place,
        ):
            byte_range = ByteRange(byte_range.file, byte_range.start, byte_range.nbytes + info.nbytes, byte_range.place)
            continue
        if byte_range:
            yield byte_range
        byte_range = ByteRange(info.file, info.start, info.nbytes, place)
    if byte_range:
        yield byte_range


class ShardWriter:
    """Does the steps: one thread moves bytes while the other computes; they write to different places of the same files."""

    def __init__(
        self, shards: list["Shard"], targets: list[OpenShard], checkpoint: Checkpoint, advance: Callable[[int], None]
    ) -> None:
        self.checkpoint, self.advance = checkpoint, advance
        self.ways = list(copy_bytes.WAYS)
        self.planned = {item.name: item for shard in shards for item in shard.items}
        self.places = {item.name: (target, item) for target in targets for item in target.shard.items}
        self.stopped = threading.Event()

    def run(self, step: FileStep, source_files: SourceFiles | None) -> None:
        if source_files:  # what is checked later must be known by itself: the source's bytes will be gone
            self.ways = [way for way in self.ways if way in copy_bytes.SEEN]
            for file in sorted(step.files):
                source_files.fetch(file)
        with ThreadPoolExecutor(max_workers=1) as pool:
            moving = pool.submit(self._move, step)
            try:
                self._compute(step)
            except BaseException:
                self.stopped.set()
                raise
            moving.result()
        if source_files:
            for file in step.done:
                source_files.release(file)

    def _move(self, step: FileStep) -> None:
        def tell(target: OpenShard, piece: CopiedRange) -> None:
            if self.stopped.is_set():
                raise InterruptedError("the other half of the work has failed")
            target.stands(piece)
            self.advance(piece.nbytes)

        with ByteCopier(self.ways) as copier:
            for target, byte_range in step.ranges:
                source = self.checkpoint.descriptor(byte_range.file)
                with naming(target.path):
                    copier.move(source, target.descriptor, byte_range, functools.partial(tell, target))

    def _compute(self, step: FileStep) -> None:
        """Run each rule once, one after the other, and put its results where they belong; then what is only cast."""
        for rule in step.rules:
            for name, tensor in compute(rule, self.checkpoint, self.planned).items():
                if name in self.places:
                    self._put(name, tensor)
        for item in step.casts:
            self._put(item.name, finish(self.checkpoint.read(item.source), item))

    def _put(self, name: str, tensor: "torch.Tensor") -> None:
        import torch

        target, item = self.places[name]
        if item.nbytes:
            target.put(tensor.reshape(-1).view(torch.uint8).numpy().data, target.shard.offsets[name])
        self.advance(item.nbytes)
