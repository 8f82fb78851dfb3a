"""What is not what was prepared is never trained on: every block is compared with its checksum when it is first read."""

import itertools
import json
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.test_uptrain_killed import torchrun
from tests.test_uptrain_resume import untimed
from tests.uptraining import BASE, QUIET, Workshop, config, make_workshop, metrics, weights
from tests.warm_python import ENVIRONMENT, shared_python
from upfit.errors import UpfitError
from upfit.uptrain.data import prepare as preparing
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.rows import TextRows
from upfit.uptrain.data.shard_writer import ShardWriter
from upfit.uptrain.data.shards import DOCUMENTS, MANIFEST, CheckedFile, Shards
from upfit.uptrain.run.state import Workspace
from upfit.uptrain.train import uptrain

BLOCK, TOKENS = 64, 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """1000 tokens of two bytes in documents of 10 and shards of 300, with checksums for 64 bytes each."""
    writer = ShardWriter(tmp_path, "uint16", shard_tokens=300, block_bytes=BLOCK)
    for at in range(0, TOKENS, 10):
        writer.add(list(range(at, at + 10)))
    writer.finish({})
    return tmp_path


@pytest.mark.parametrize("ids", [[0], [0, 0, 0], [0, 7, 3], [65_535]])
def test_the_manifest_counts_what_was_written(tmp_path: Path, ids: list[int]) -> None:
    """Also where the largest token is the first of the vocabulary."""
    writer = ShardWriter(tmp_path, "uint16")
    writer.add(ids)
    writer.finish({})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert [manifest[name] for name in ("tokens", "documents", "largest_id")] == [len(ids), 1, max(ids)]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 63, 64, 599, 400])
@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00002.bin"])
def test_a_flipped_bit_is_found_when_it_is_read_and_not_before(folder: Path, name: str, at: int) -> None:
    flip(folder / name, at)
    shards = Shards(folder)
    first = int(name[7:12]) * 300  # the first token of that file
    begin, end = first + at // BLOCK * BLOCK // 2, min(first + (at // BLOCK + 1) * BLOCK // 2, first + 300)
    for start, stop in ((0, begin), (end, TOKENS)):
        assert start == stop or shards.read(start, stop).tolist() == list(range(start, stop))
    for start in (begin, end - 1, begin):
        with pytest.raises(UpfitError, match=f"{name} is damaged in the .* bytes from offset {at // BLOCK * BLOCK}:"):
            shards.read(start, start + 1)


def test_all_that_is_read_is_checked_and_nothing_else(tmp_path: Path) -> None:
    """Whatever is read, after whatever was read: it is refused just when a block of it is damaged."""
    content, items, blocks = bytes(range(26)), 13, 5  # two bytes an item, six a block but the last
    crc32 = "".join(f"{zlib.crc32(content[at : at + 6]):08x}" for at in range(0, 26, 6))
    for bad in range(blocks):
        path = tmp_path / str(bad)
        path.write_bytes(content)
        flip(path, 6 * bad)
        good = [block for block in range(blocks) if block != bad]
        for start, end, earlier in itertools.product(range(items), range(1, items + 1), good):
            if start >= end:
                continue
            file = CheckedFile(path, np.dtype("uint16"), crc32, 6)
            file.read(3 * earlier, min(3 * earlier + 3, items))
            if 3 * bad < end and start < 3 * bad + 3:
                with pytest.raises(UpfitError, match=f"from offset {6 * bad}:"):
                    file.read(start, end)
            else:
                assert file.read(start, end).tobytes() == content[2 * start : 2 * end]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "end lost": lambda content: content[:500] + bytes(len(content) - 500),
    "two blocks exchanged": lambda content: content[64:128] + content[:64] + content[128:],
    "another text": lambda content: np.random.default_rng(0).bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_other_content_of_the_same_size_is_found(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "tokens-00001.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UpfitError, match="tokens-00001.bin is damaged"):
        Shards(folder).read(0, TOKENS)


def test_damaged_positions_of_documents_are_found_at_once(folder: Path) -> None:
    flip(folder / DOCUMENTS, 333)
    with pytest.raises(UpfitError, match="documents.bin is damaged in the 64 bytes from offset 320"):
        Shards(folder)


def test_a_block_is_checked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    shards, whole = Shards(folder), zlib.crc32

    def counting(content: bytes) -> int:
        asked.append(len(content))
        return whole(content)

    monkeypatch.setattr(zlib, "crc32", counting)
    for _ in range(2):
        shards.read(0, 40)
        assert asked == [BLOCK, BLOCK], "two blocks of 32 tokens, and nothing else"


def first_format(folder: Path) -> None:
    """The manifest as it was before there were checksums of blocks."""
    told = json.loads((folder / MANIFEST).read_text())
    files = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in told["files"].items()}
    del told["block_bytes"]
    (folder / MANIFEST).write_text(json.dumps({**told, "format": 1, "files": files}))


def test_manifests_of_the_first_format_are_read(folder: Path) -> None:
    known = Shards(folder).fingerprint
    first_format(folder)
    shards = Shards(folder)
    assert shards.read(0, TOKENS).tolist() == list(range(TOKENS)) and shards.fingerprint == known
    shards.verify()
    flip(folder / "tokens-00001.bin", 5)
    with pytest.raises(UpfitError, match="tokens-00001.bin is damaged: its SHA-256"):
        Shards(folder).verify()


@pytest.mark.parametrize("crc32", ["", "0011", "no hexadecimal digits"])
def test_a_manifest_without_all_checksums_is_refused(folder: Path, crc32: str) -> None:
    told = json.loads((folder / MANIFEST).read_text())
    told["files"]["tokens-00000.bin"]["crc32"] = crc32
    (folder / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(UpfitError, match="is not a manifest of format"):
        Shards(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A workshop whose shards have a checksum for each row of 32 tokens."""
    place = tmp_path_factory.mktemp("shop")
    made = make_workshop(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "ShardWriter", lambda folder, dtype: ShardWriter(folder, dtype, block_bytes=BLOCK))
        prepare([str(place / "text.jsonl")], place / "checked", str(made.teacher), "text", QUIET)
    yield Workshop(made.teacher, made.student, place / "checked")


def damaged(shop: Workshop, folder: Path) -> tuple[Workshop, Path, int]:
    """The shop with a damaged copy of the data, the file, and the first step (not one of the first three) that reads there."""
    data = Path(shutil.copytree(shop.data, folder / "data"))
    rows = TextRows(Shards(data), BASE["length"], BASE["holdout"], 0)
    read = [{row, row + 1} for row in rows.holdout]  # the last label of a row is the first token of the next block
    for index in range(48):
        row = rows.sample(index)
        if index >= 12 and not any({row} & known for known in read):
            flip(data / "tokens-00000.bin", row * BLOCK + 9)
            return Workshop(shop.teacher, shop.student, data), data / "tokens-00000.bin", index // 4
        read.append({row, row + 1})
    raise AssertionError("no block is read for the first time")


@pytest.mark.slow
def test_a_run_ends_at_damaged_tokens_with_all_steps_before_saved(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "whole")
    broken, path, step = damaged(shop, tmp_path)
    for resume in (False, True):
        with pytest.raises(UpfitError, match="tokens-00000.bin is damaged in the 64 bytes from offset"):
            broken.run(tmp_path / "out", resume=resume, save_every="100")
        saved = next(Workspace(tmp_path / "out.upfit-work").checkpoints())
        assert int(saved.name[5:]) == step == len(metrics(tmp_path / "out.upfit-work"))
    shutil.copy(shop.data / path.name, path)
    broken.run(tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "out") == untimed(tmp_path / "whole")


def test_data_can_be_verified_before_the_first_step(shop: Workshop, tmp_path: Path) -> None:
    broken, _, _ = damaged(shop, tmp_path)
    settings = config(verify_data=True)
    with pytest.raises(UpfitError, match="SHA-256"):
        uptrain(str(broken.student), str(broken.data), tmp_path / "out", settings, False, False, QUIET)
    assert not (tmp_path / "out.upfit-work").exists()


@pytest.mark.slow
def test_one_process_that_reads_damaged_tokens_ends_all_with_a_checkpoint(shop: Workshop, tmp_path: Path) -> None:
    broken, _, step = damaged(shop, tmp_path)
    words = torchrun(shared_python(), broken, tmp_path, tmp_path / "out", save_every="100")
    ended = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ended.returncode and "tokens-00000.bin is damaged in the 64 bytes" in ended.stderr
    assert "another process could not read its rows" in ended.stderr
    assert [saved.name for saved in Workspace(tmp_path / "out.upfit-work").checkpoints()] == [f"step-{step:08d}"]
