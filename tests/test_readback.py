"""What was written is read back: a copy that went wrong is not kept, whichever way it moved."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny, tiny_llama
from upfit.checkpoint import copy_bytes, read_back
from upfit.checkpoint.copy_bytes import BLOCK, CopiedRange
from upfit.checkpoint.read_back import Disk, check_written
from upfit.checkpoint.shard import Shard
from upfit.convert import conversion
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.output import Output


def run(source: Path, out: Path, kv_heads: int = 2, **settings: Any) -> None:
    recipe = get_recipe("gqa")
    options = recipe.options(kv_heads=kv_heads, method="mean")
    convert(recipe, str(source), out, options, Settings(**settings), Output(quiet=True))


def flip(path: Path, place: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, bytes([os.pread(descriptor, 1, place)[0] ^ 1]), place)
    os.close(descriptor)


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`damage(choose)`: after the shards are written, one bit of the byte that `choose(shard)` names is another one."""
    original = conversion.write_shards

    def install(choose: Callable[[Shard], int]) -> None:
        def damaged(shards: Any, rules: Any, checkpoint: Any, folder: Path, *rest: Any) -> None:
            original(shards, rules, checkpoint, folder, *rest)
            flip(folder / shards[0].name, choose(shards[0]))

        monkeypatch.setattr(conversion, "write_shards", damaged)

    return install


PLACES: dict[str, Callable[[Shard], int]] = {
    "moved": lambda shard: shard.offsets["model.layers.0.mlp.down_proj.weight"] + 4000,
    "computed": lambda shard: shard.offsets["model.layers.1.self_attn.k_proj.weight"] + 1,
    "header": lambda shard: 12,
    "last": lambda shard: shard.nbytes - 1,
}


@pytest.mark.parametrize("way", ["direct", "kernel", "plain"])
@pytest.mark.parametrize("place", PLACES)
def test_one_bit_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[..., None], way: str, place: str
) -> None:
    monkeypatch.setattr(copy_bytes, "WAYS", (way, "plain"))
    damage(PLACES[place])
    source = save_tiny(tmp_path / "source", tiny_llama(intermediate_size=256))
    with pytest.raises(UpfitError, match="read back, has other bytes") as caught:
        run(source, tmp_path / "out")
    assert "\n" not in str(caught.value) and sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_it_can_be_left_out_alone(tmp_path: Path, damage: Callable[..., None]) -> None:
    """A bit that the numbers do not show passes then; the rest of the check is still made."""
    damage(PLACES["moved"])
    run(save_tiny(tmp_path / "source", tiny_llama(intermediate_size=256)), tmp_path / "out", verify_bytes=False)
    (step,) = json.loads((tmp_path / "out" / "recipe.json").read_text())["steps"]
    assert step["measurements"]["verify"]["tokens"] > 0
    run(tmp_path / "source", tmp_path / "unchecked", verify=False)


def test_bytes_of_another_place_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They arrive as they were read, so that no checksum tells."""
    original = copy_bytes.ByteCopier.move

    def shifted(self: copy_bytes.ByteCopier, source: int, target: int, run: copy_bytes.ByteRange, told: Any) -> None:
        original(self, source, target, copy_bytes.ByteRange(run.file, run.start - 4, run.nbytes, run.place), told)

    monkeypatch.setattr(copy_bytes.ByteCopier, "move", shifted)
    with pytest.raises(UpfitError, match="is not the source's"):
        run(save_tiny(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pieces_are_read_from_the_disk_in_whole_blocks_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the page cache, which takes whole blocks alone; what it gives too little of is read as usual."""
    content, preadv, asked = os.urandom(3 * BLOCK + 100), os.preadv, list[tuple[int, int]]()
    (tmp_path / "file").write_bytes(content)

    def noted(descriptor: int, buffers: list[Any], place: int) -> int:
        asked.append((place, len(buffers[0])))
        return preadv(descriptor, buffers, place)

    with Disk(tmp_path / "file") as disk:
        direct, disk.direct = disk.direct, disk.plain  # wherever the test runs
        monkeypatch.setattr(read_back.os, "preadv", noted)
        monkeypatch.setattr(read_back, "read_exactly", lambda *_: pytest.fail("as if there were no such reading"))
        for place, nbytes in ((0, 1), (0, BLOCK), (5, BLOCK), (BLOCK - 1, 2), (BLOCK + 7, BLOCK - 7), (3 * BLOCK, 100)):
            assert bytes(disk.take(nbytes, place)) == content[place : place + nbytes]
            start, size = asked.pop()
            assert start % BLOCK == size % BLOCK == 0 and not asked
            assert start <= place < start + BLOCK and place + nbytes <= start + size < place + nbytes + BLOCK
        disk.direct = direct
        monkeypatch.setattr(read_back.os, "preadv", lambda *_: 5)
        monkeypatch.setattr(read_back, "read_exactly", lambda descriptor, nbytes, place: (descriptor, nbytes, place))
        if direct != -1:
            assert disk.take(6, 0) == (disk.plain, 6, 0) and bytes(disk.take(5, 0)) != b""


def test_shared_blocks_are_not_read_and_others_are_compared_with_the_source(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    asked: list[tuple[str, int, int]] = []

    def read(name: str, nbytes: int, start: int) -> bytes:
        asked.append((name, nbytes, start))
        return bytes(range(start - 7, start - 7 + nbytes))

    shard = Shard("file", [], offsets={"a": 0, "b": 60})
    shard.pieces = [CopiedRange(0, 60, None, "source", 3, shared=True), CopiedRange(60, 40, None, "source", 67)]
    done: list[int] = []
    check_written(tmp_path, [shard], read, done.append)
    assert asked == [("source", 40, 67)] and done == [40]
    flip(tmp_path / "file", 99)
    with pytest.raises(UpfitError, match="in b or behind it"):
        check_written(tmp_path, [shard], read, done.append)
