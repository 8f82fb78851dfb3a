"""The files of a result: which tensors each holds, and where each tensor begins."""

from dataclasses import dataclass, field

from upfit.checkpoint.copy_bytes import BLOCK, CopiedRange
from upfit.checkpoint.execute import Planned
from upfit.checkpoint.reader import SINGLE, Checkpoint
from upfit.checkpoint.safetensors_header import encode_header


@dataclass
class Shard:
    """One output file: its tensors in order, and where each begins. `pieces` are what has been written of it in this run."""

    name: str
    items: list[Planned]
    header: bytes = b""
    offsets: dict[str, int] = field(default_factory=dict)
    pieces: list[CopiedRange] = field(default_factory=list)

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
