"""Writes the shards of a result. All sizes are known beforehand, so every tensor has its place, and nothing is kept in memory.

Untouched tensors are copied as bytes (`copy_bytes.py`). Computed tensors come last in their file, so that the copied ones form
long runs. The data begins at the same offset within a block as in the source's file, so that whole blocks can be copied.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from upfit.checkpoint.copy_bytes import REFUSALS
from upfit.checkpoint.disk_errors import naming
from upfit.checkpoint.finished_shards import FinishedShards
from upfit.checkpoint.plan import Rule
from upfit.checkpoint.reader import INDEX, Checkpoint
from upfit.checkpoint.shard import Shard
from upfit.checkpoint.write_order import OpenShard, ShardWriter, SourceFiles, file_steps


def write_shards(
    shards: list[Shard],
    rules: Sequence[Rule],
    checkpoint: Checkpoint,
    folder: Path,
    advance: Callable[[int], None],
    finished_shards: FinishedShards | None = None,
    source_files: SourceFiles | None = None,
) -> None:
    """Write every shard into `folder`, and the index where there is more than one. `advance` is told bytes as they go.

    Shards that `finished_shards` knows as finished are left as they are. With `source_files` the files of the source are
    fetched one after the other and released when they are done with. Raises OSError, with the name of the file, when a disk is
    full or fails.
    """
    verified = finished_shards.verified if finished_shards else {}
    advance(sum(item.nbytes for shard in shards if shard.name in verified for item in shard.items))
    targets: dict[str, OpenShard] = {}
    try:
        for shard in shards:
            if shard.name not in verified:
                path = folder / shard.name
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                targets[shard.name] = OpenShard(shard, path, descriptor, finished_shards, shard.nbytes)
                with naming(path):
                    _reserve(descriptor, shard.nbytes)
        for target in targets.values():
            target.put(target.shard.header, 0)
        writer = ShardWriter(shards, list(targets.values()), checkpoint, advance)
        for step in file_steps(list(targets.values()), rules, checkpoint):
            writer.run(step, source_files)
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
