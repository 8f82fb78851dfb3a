"""Writes the shards of a result: sizes are known beforehand, so every tensor has its place and nothing is kept in memory.

Untouched tensors move as bytes, by the kernel (`copy_file_range`) where the system has it. Computed tensors come last in
their file, so that what is copied stays in long runs.
"""

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from upfit.convert.checkpoint import INDEX, SINGLE, Checkpoint
from upfit.convert.engine import Planned, compute, finish
from upfit.convert.recipe import Rule
from upfit.convert.safetensors_file import encode_header
from upfit.errors import UpfitError

if TYPE_CHECKING:
    import torch

CHUNK = 64 * 2**20
BUFFER = 16 * 2**20
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF}
Advance = Callable[[int], None]


@dataclass
class Shard:
    """One output file: its tensors in order, and where each begins."""

    name: str
    items: list[Planned]
    header: bytes = b""
    offsets: dict[str, int] = field(default_factory=dict)

    def lay_out(self) -> None:
        entries = [(item.name, item.dtype, item.shape, item.nbytes) for item in self.items]
        self.header = encode_header(entries, {"format": "pt"})
        position = len(self.header)
        for item in self.items:
            self.offsets[item.name] = position
            position += item.nbytes
        self.nbytes = position


def split(planned: list[Planned], checkpoint: Checkpoint, max_bytes: int | None) -> list[Shard]:
    """Shards as in the source, or of at most `max_bytes` each (a single larger tensor gets a shard of its own)."""
    order = {path: index for index, path in enumerate(checkpoint.files)}

    def place(item: Planned) -> tuple[int, bool, int]:
        info = checkpoint.info(item.source)
        return order[info.file], item.rule is not None or item.cast, info.start

    groups: list[list[Planned]] = []
    size, last = 0, None
    for item in sorted(planned, key=place):
        file = place(item)[0]
        full = file != last if max_bytes is None else size + item.nbytes > max_bytes
        if not groups or (full and groups[-1]):
            groups.append([])
            size = 0
        groups[-1].append(item)
        size, last = size + item.nbytes, file
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    shards = [Shard(name, group) for name, group in zip(names, groups, strict=True)]
    for shard in shards:
        shard.lay_out()
    return shards


def write_shards(shards: list[Shard], rules: Sequence[Rule], checkpoint: Checkpoint, folder: Path, advance: Advance) -> None:
    """Write every shard into `folder`, and the index where there is more than one. `advance` is told bytes as they go.

    Raises UpfitError when the disk is full.
    """
    descriptors = {}
    try:
        for shard in shards:
            descriptors[shard.name] = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            _reserve(descriptors[shard.name], shard.nbytes)
        for shard in shards:
            _write(descriptors[shard.name], shard.header, 0)
        _copy_and_compute(shards, rules, checkpoint, descriptors, advance)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UpfitError(f"the disk of {folder.parent} is full; free {sum(s.nbytes for s in shards) / 1e9:.2f} GB") from error
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    if len(shards) > 1:
        _write_index(shards, folder)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take the space now, so that a full disk shows before the work and not after it."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in NO_KERNEL_COPY:
            raise
        os.ftruncate(descriptor, nbytes)


def _copy_and_compute(
    shards: list[Shard], rules: Sequence[Rule], checkpoint: Checkpoint, descriptors: dict[str, int], advance: Advance
) -> None:
    """The kernel copies in one thread while the other computes: they write to different places of the same files."""
    stopped = threading.Event()

    def tell(nbytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError("the other half of the work has failed")
        advance(nbytes)

    with ThreadPoolExecutor(max_workers=1) as pool:
        copying = [pool.submit(_copy_runs, shard, checkpoint, descriptors[shard.name], tell) for shard in shards]
        try:
            _compute(shards, rules, checkpoint, descriptors, advance)
        except BaseException:
            stopped.set()
            raise
        for done in copying:
            done.result()


def _copy_runs(shard: Shard, checkpoint: Checkpoint, target: int, advance: Advance) -> None:
    for file, start, end, place in _runs(shard, checkpoint):
        _copy(checkpoint.descriptor(file), target, start, end - start, place, advance)


def _runs(shard: Shard, checkpoint: Checkpoint) -> Iterable[tuple[Path, int, int, int]]:
    """(source file, start, end, place in the shard) of untouched tensors, neighbours joined."""
    run: tuple[Path, int, int, int] | None = None
    for item in shard.items:
        if item.rule is not None or item.cast:
            continue
        info, place = checkpoint.info(item.source), shard.offsets[item.name]
        if run and run[0] == info.file and run[2] == info.start and run[3] + run[2] - run[1] == place:
            run = (run[0], run[1], info.end, run[3])
            continue
        if run:
            yield run
        run = (info.file, info.start, info.end, place)
    if run:
        yield run


def _copy(source: int, target: int, start: int, nbytes: int, place: int, advance: Advance) -> None:
    done, by_kernel = 0, hasattr(os, "copy_file_range")
    while done < nbytes:
        size = min(CHUNK if by_kernel else BUFFER, nbytes - done)
        if by_kernel:
            try:
                moved = os.copy_file_range(source, target, size, start + done, place + done)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
                by_kernel = False
                continue
        else:
            data = os.pread(source, size, start + done)
            _write(target, data, place + done)
            moved = len(data)
        if moved == 0:
            raise UpfitError("a source file became shorter while it was read; start again on a folder at rest")
        done += moved
        advance(moved)


def _compute(
    shards: list[Shard], rules: Sequence[Rule], checkpoint: Checkpoint, descriptors: dict[str, int], advance: Advance
) -> None:
    """Run each rule once, one after the other, and put its results where they belong; then the tensors that are only cast."""
    places = {item.name: (shard, item) for shard in shards for item in shard.items}
    planned = {name: item for name, (_, item) in places.items()}
    for rule in rules:
        for name, tensor in compute(rule, checkpoint, planned).items():
            _write_tensor(*places[name], tensor, descriptors, advance)
    for shard, item in places.values():
        if item.cast:
            _write_tensor(shard, item, finish(checkpoint.read(item.source), item), descriptors, advance)


def _write_tensor(shard: Shard, item: Planned, tensor: "torch.Tensor", descriptors: dict[str, int], advance: Advance) -> None:
    import torch

    if item.nbytes:
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        _write(descriptors[shard.name], data.data, shard.offsets[item.name])
    advance(item.nbytes)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _write_index(shards: list[Shard], folder: Path) -> None:
    items = [(item, shard.name) for shard in shards for item in shard.items]
    total = {
        "total_parameters": sum(math.prod(item.shape) for item, _ in items),
        "total_size": sum(item.nbytes for item, _ in items),
    }
    index = {"metadata": total, "weight_map": {item.name: name for item, name in sorted(items, key=lambda pair: pair[0].name)}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
