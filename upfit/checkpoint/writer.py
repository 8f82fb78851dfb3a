"""Writes the shards of a result: sizes are known beforehand, so every tensor has its place and nothing is kept in memory.

Untouched tensors move as bytes (`copy_bytes.py`). Computed tensors come last in their file, so that what is moved stays in long
runs, and the data begins where it does in the source's file modulo a block, so that whole blocks can be moved.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upfit.checkpoint.copy_bytes import BLOCK, REFUSALS, Piece
from upfit.checkpoint.disk_errors import naming
from upfit.checkpoint.finished_shards import Journal
from upfit.checkpoint.reader import INDEX, SINGLE, Checkpoint
from upfit.checkpoint.safetensors_header import encode_header
from upfit.checkpoint.write_order import Depot, Target, Work, stages
from upfit.convert.planned import Planned
from upfit.convert.recipe import Rule


@dataclass
class Shard:
    """One output file: its tensors in order, and where each begins. `pieces` are what has been written of it in this run."""

    name: str
    items: list[Planned]
    header: bytes = b""
    offsets: dict[str, int] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    def lay_out(self, checkpoint: Checkpoint) -> None:
        entries = [(item.name, item.dtype, item.shape, item.nbytes) for item in self.items]
        block, phase, position = 8, 0, 0
        for item in self.items:
            if item.untouched:
                start = checkpoint.info(item.source).start - position
                block, phase = (BLOCK, start) if start % 8 == 0 else (8, 0)
                break
            position += item.nbytes
        self.header = encode_header(entries, {"format": "pt"}, block, phase)
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
        shard.lay_out(checkpoint)
    return shards


def write_shards(
    shards: list[Shard],
    rules: Sequence[Rule],
    checkpoint: Checkpoint,
    folder: Path,
    advance: Callable[[int], None],
    journal: Journal | None = None,
    depot: Depot | None = None,
) -> None:
    """Write every shard into `folder`, and the index where there is more than one. `advance` is told bytes as they go.

    Shards that `journal` knows as finished are left as they are. With a `depot` the files of the source are brought one after
    the other and dropped when they are done with.
    Raises OSError, with the name of the file, when a disk is full or fails.
    """
    kept = journal.kept if journal else {}
    advance(sum(item.nbytes for shard in shards if shard.name in kept for item in shard.items))
    targets: dict[str, Target] = {}
    try:
        for shard in shards:
            if shard.name not in kept:
                path = folder / shard.name
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                targets[shard.name] = Target(shard, path, descriptor, journal, shard.nbytes)
                with naming(path):
                    _reserve(descriptor, shard.nbytes)
        for target in targets.values():
            target.put(target.shard.header, 0)
        work = Work(shards, list(targets.values()), checkpoint, advance)
        for stage in stages(list(targets.values()), rules, checkpoint):
            work.run(stage, depot)
    finally:
        for target in targets.values():
            os.close(target.descriptor)
    if len(shards) > 1:
        _write_index(shards, folder)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take the space now, so that a full disk shows before the work and not after it."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        os.ftruncate(descriptor, nbytes)


def _write_index(shards: list[Shard], folder: Path) -> None:
    items = [(item, shard.name) for shard in shards for item in shard.items]
    total = {
        "total_parameters": sum(math.prod(item.shape) for item, _ in items),
        "total_size": sum(item.nbytes for item, _ in items),
    }
    index = {"metadata": total, "weight_map": {item.name: name for item, name in sorted(items, key=lambda pair: pair[0].name)}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
