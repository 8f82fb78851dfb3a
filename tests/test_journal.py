"""A killed conversion goes on where it was, ends with the same bytes, and trusts nothing that has changed meanwhile."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny, tiny_llama
from upfit.checkpoint import copy_bytes
from upfit.checkpoint.copy_bytes import BLOCK, ByteCopier, ByteRange
from upfit.checkpoint.finished_shards import JOURNAL, FinishedShards
from upfit.convert import conversion
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.output import Output

SHARDS = 3


def run(source: Path, out: Path, kv_heads: int = 2, **settings: Any) -> None:
    recipe = get_recipe("gqa")
    options = recipe.options(kv_heads=kv_heads, method="mean")
    convert(recipe, str(source), out, options, Settings(verify=False, **settings), Output(quiet=True))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """the work folder as a kill leaves it after all shards but the last: a stop by the user keeps the same."""
    source = save_tiny(tmp_path / "source", tiny_llama(num_hidden_layers=4), shards=SHARDS)
    run(source, tmp_path / "whole")
    original = conversion.write_shards

    def stop(shards: Any, rules: Any, checkpoint: Any, folder: Path, *rest: Any) -> None:
        original(shards, rules, checkpoint, folder, *rest)
        lines = (folder / "conversion.jsonl").read_text().splitlines(keepends=True)
        assert len(lines) == len(shards) + 1
        (folder / "conversion.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(conversion, "write_shards", stop)
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return tmp_path


def identities(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_finished_shards_are_kept(stopped: Path) -> None:
    before = identities(stopped / "out.upfit-work" / "result")
    run(stopped / "source", stopped / "out")
    after = identities(stopped / "out")
    assert sum(before[name] == after[name] for name in before) >= len(before) - 1
    assert weights(stopped / "out") == weights(stopped / "whole")
    assert not (stopped / "out" / "conversion.jsonl").exists()


def test_a_damaged_shard_is_written_again(stopped: Path) -> None:
    for path in (stopped / "out.upfit-work" / "result").glob("*.safetensors"):
        before = path.stat()
        with open(path, "r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    run(stopped / "source", stopped / "out")
    assert weights(stopped / "out") == weights(stopped / "whole")


@pytest.mark.parametrize("change", ["options", "source"])
def test_other_work_starts_anew(stopped: Path, change: str) -> None:
    if change == "source":
        save_tiny(stopped / "source", tiny_llama(num_hidden_layers=4, rms_norm_eps=1e-5), shards=SHARDS)
    kv_heads = 1 if change == "options" else 2
    run(stopped / "source", stopped / "out", kv_heads)
    run(stopped / "source", stopped / "fresh", kv_heads)
    assert weights(stopped / "out") == weights(stopped / "fresh")


@pytest.mark.parametrize("written, left", [(BLOCK, ["direct", "plain"]), (BLOCK - 1, ["plain"])])
def test_a_way_that_writes_all_stays_and_one_that_does_not_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, left: list[str]
) -> None:
    """A direct write that is told to be short is made again by another way."""
    content, pwrite = os.urandom(2 * BLOCK), os.pwrite
    (tmp_path / "a").write_bytes(content)
    source, target = os.open(tmp_path / "a", os.O_RDONLY), os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(ByteCopier, "_reopen", lambda self, descriptor, flags: descriptor)
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[:written], place))
    with ByteCopier(["direct", "plain"]) as copier:
        copier.move(source, target, ByteRange(tmp_path / "a", BLOCK, BLOCK, 0), lambda piece: None)
        assert copier.ways == left
    assert os.pread(target, BLOCK, 0) == content[BLOCK:]
    os.close(source)
    os.close(target)


@pytest.mark.parametrize("way", copy_bytes.WAYS)
@pytest.mark.parametrize("shift", [0, 8, 13])
def test_every_way_moves_the_same_bytes(tmp_path: Path, way: str, shift: int) -> None:
    """Runs with edges, at another place of their block too; a way that the disk refuses falls back."""
    content = os.urandom(5 * BLOCK + 77)
    (tmp_path / "a").write_bytes(content)
    start, place, nbytes = 100, BLOCK + 100 + shift, 4 * BLOCK + 50
    source, target = os.open(tmp_path / "a", os.O_RDONLY), os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    pieces: list[copy_bytes.CopiedRange] = []
    with ByteCopier([way, "plain"] if way != "plain" else ["plain"]) as copier:
        copier.move(source, target, ByteRange(tmp_path / "a", start, nbytes, place), pieces.append)
    assert os.pread(target, nbytes, place) == content[start : start + nbytes]
    assert sum(piece.nbytes for piece in pieces) == nbytes
    os.close(source)
    os.close(target)


@pytest.mark.parametrize(("second", "stands"), [((50, 50), True), ((40, 50), False), ((60, 50), False), ((50, 40), False)])
def test_a_finished_shard_is_known_by_pieces_that_leave_no_gap(tmp_path: Path, second: tuple[int, int], stands: bool) -> None:
    """Each piece is what it should be; together they are the shard only where one begins at the end of the other."""
    content = bytes(range(100)) + bytes(10)
    (tmp_path / "shard").write_bytes(content[:100])
    ranges = [(0, 50), second]
    pieces = [[place, size, zlib.crc32(content[:100][place : place + size])] for place, size in ranges]
    settings: dict[str, Any] = {"the": "same"}
    lines = [json.dumps(settings), json.dumps({"name": "shard", "nbytes": 100, "pieces": pieces})]
    (tmp_path / JOURNAL).write_text("".join(line + "\n" for line in lines))
    finished = FinishedShards(tmp_path, settings, lambda file, nbytes, start: b"")
    assert ("shard" in finished.verified) == stands
