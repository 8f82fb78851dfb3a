"""Text becomes token shards and comes back; rows are addressed by integers, whatever the number of processes."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.folders import letter_tokenizer
from tests.uptraining import QUIET, text
from upfit.errors import UpfitError
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.rows import IGNORE, TextRows
from upfit.uptrain.data.shard_writer import ShardWriter
from upfit.uptrain.data.shards import MANIFEST, Shards

END = 1


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def documents_of(shards: Shards) -> list[str]:
    letters = {index: letter for letter, index in letter_tokenizer().get_vocab().items()}
    starts = [*shards.document_starts(0, shards.tokens), shards.tokens]
    pieces = [shards.read(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert all(piece[-1] == END and END not in piece[:-1] for piece in pieces)
    return ["".join(letters[i] for i in piece[:-1]) for piece in pieces]


def write_all_kinds(folder: Path) -> list[str]:
    """A file of every kind with a text of its own; the texts in the order in which they are read."""
    from pyarrow import Table, parquet

    folder.mkdir()
    texts = [text(seed, 5) for seed in range(6)]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts[1:3]) + "\n\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": texts[3]}) + "\n")
    parquet.write_table(Table.from_pydict({"body": [texts[4], None], "n": [1, 2]}), folder / "d.parquet")
    (folder / "e").mkdir()
    (folder / "e" / "f.py").write_text(texts[5])
    (folder / "e" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (folder / "e" / "empty.md").write_text(" \n")
    (folder / ".hidden").write_text("secret")
    return texts


def test_every_kind_of_input_comes_back(tmp_path: Path, tokenizer: str) -> None:
    texts = write_all_kinds(tmp_path / "in")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer, "body", QUIET)
    shards = Shards(tmp_path / "out")
    assert documents_of(shards) == texts
    assert manifest.documents == 6 and manifest.tokens == sum(len(t) + 1 for t in texts) == shards.tokens
    assert manifest.dtype == "uint16" and json.loads((tmp_path / "out" / MANIFEST).read_text()) == manifest.record()
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "in", "out"}


def test_documents_begin_with_the_begin_token_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = letter_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("ab")
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", str(tmp_path / "tokenizer"), "text", QUIET)
    assert Shards(tmp_path / "out").read(0, 4).tolist() == [2, 3, 4, END] and manifest.tokenizer.bos == 2


def test_a_limit_stops_after_the_document_that_reaches_it(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * 9}) for _ in range(10)))
    manifest = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, "text", QUIET, tokens="25")
    assert manifest.tokens == 30


def spoiled(tmp_path: Path, what: str) -> str:
    path = tmp_path / f"{what}.jsonl"
    contents = {"empty": b"", "json": b"{", "field": b'{"other": "x"}', "list": b"[1]", "number": b'{"text": 1}'}
    path.write_bytes(contents[what])
    return str(path)


@pytest.mark.parametrize(
    "what,told", [("empty", "no text"), ("json", "line 1"), ("field", "other"), ("list", "list"), ("number", "'text'")]
)
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path: Path, tokenizer: str, what: str, told: str) -> None:
    given = spoiled(tmp_path, what)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UpfitError, match=told) as caught:
        prepare([given], tmp_path / "out", tokenizer, "text", QUIET)
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


def test_bad_places_are_refused(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    cases: list[tuple[str, Path, str]] = [
        (str(tmp_path / "none.txt"), tmp_path / "out", "no file"),
        (str(tmp_path / "binary"), tmp_path / "out", "UTF-8"),
        (str(tmp_path), tmp_path / "out", "overlaps"),
        (str(tmp_path / "a.txt"), tmp_path / "tokenizer", "overlaps"),
        (str(tmp_path / "a.txt"), tmp_path / "taken", "not empty"),
    ]
    for given, out, told in cases:
        with pytest.raises(UpfitError, match=told):
            prepare([given], out, tokenizer, "text", QUIET)
    with pytest.raises(UpfitError, match="no tokenizer"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", str(tmp_path / "taken"), "text", QUIET)


def test_overwrite_replaces_only_what_upfit_wrote(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("abc")
    for _ in range(2):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, "text", QUIET, overwrite=True)
    with pytest.raises(UpfitError, match="--overwrite"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, "text", QUIET)


def test_a_missing_package_is_named(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UpfitError, match=r"upfit\[data\]"):
        prepare(["some/corpus"], tmp_path / "out", tokenizer, "text", QUIET)


def spans(folder: Path, lengths: list[int], **options: Any) -> Shards:
    """Shards whose tokens count up from 0, in documents of these lengths."""
    folder.mkdir()
    writer, at = ShardWriter(folder, "uint16", **options), 0
    for length in lengths:
        writer.add(list(range(at, at + length)))
        at += length
    writer.finish({})
    return Shards(folder)


def test_rows_restart_positions_and_mask_first_tokens(tmp_path: Path) -> None:
    rows = TextRows(spans(tmp_path / "d", [3, 5, 8, 5], shard_tokens=7), length=10, holdout=0, seed=0)
    first, second = rows.at(0), rows.at(1)
    assert first.input_ids.tolist() == list(range(10)) and second.input_ids.tolist() == list(range(10, 20))
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    assert second.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert first.labels.tolist() == [1, 2, IGNORE, 4, 5, 6, 7, IGNORE, 9, 10]
    assert second.labels.tolist() == [11, 12, 13, 14, 15, IGNORE, 17, 18, 19, 20]
    unmasked = TextRows(rows.shards, length=10, holdout=0, seed=0, document_mask=False).at(0)
    assert unmasked.position_ids.tolist() == list(range(10)) and unmasked.labels.tolist() == first.labels.tolist()


def test_a_document_that_begins_just_behind_a_row_is_nobodys_label(tmp_path: Path) -> None:
    rows = TextRows(spans(tmp_path / "d", [4, 5]), length=4, holdout=0, seed=0)
    assert rows.at(0).labels.tolist() == [1, 2, 3, IGNORE] and rows.at(1).labels.tolist() == [5, 6, 7, 8]


def test_an_epoch_takes_every_row_once_and_never_the_held_out(tmp_path: Path) -> None:
    rows = TextRows(spans(tmp_path / "d", [401]), length=4, holdout=5, seed=1)
    assert len(rows.holdout) == 5 and len(rows.training) == 95
    epochs = [[rows.sample(epoch * 95 + place) for place in range(95)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted([*epoch, *rows.holdout]) == list(range(100))
    assert epochs[0] != epochs[1] != epochs[2]
    again = TextRows(rows.shards, length=4, holdout=5, seed=1)
    assert [again.sample(place) for place in range(95)] == epochs[0]
    other = TextRows(rows.shards, length=4, holdout=5, seed=2)
    assert [other.sample(place) for place in range(95)] != epochs[0] and other.holdout == rows.holdout


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_what_a_step_reads_does_not_depend_on_the_processes(tmp_path: Path, world: int) -> None:
    rows = TextRows(spans(tmp_path / "d", [401]), length=4, holdout=0, seed=0)
    shares = [rows.of_step(7, 6, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    taken = [tuple(row.input_ids) for share in shares for row in share if (row.labels != IGNORE).any()]
    wanted = [tuple(rows.at(rows.sample(7 * 6 + place)).input_ids) for place in range(6)]
    assert sorted(taken) == sorted(wanted)


def cut_short(folder: Path) -> None:
    path = folder / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])


def lie(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "tokens": 7}))


DAMAGES: list[Callable[[Path], Any]] = [
    cut_short,
    lie,
    lambda folder: (folder / MANIFEST).unlink(),
    lambda folder: (folder / MANIFEST).write_text("{}"),
    lambda folder: (folder / "documents.bin").unlink(),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_refused(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    folder = spans(tmp_path / "d", [40]).folder
    damage(folder)
    with pytest.raises(UpfitError, match="prepare"):
        Shards(folder)


def test_too_little_for_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpfitError, match="less than a row"):
        TextRows(spans(tmp_path / "d", [40]), length=40, holdout=0, seed=0)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "uint32")
    writer.add([2**17, 2**31])
    writer.finish({})
    assert Shards(tmp_path).read(0, 2).tolist() == [2**17, 2**31] and Shards(tmp_path).read(0, 2).dtype == np.int64
