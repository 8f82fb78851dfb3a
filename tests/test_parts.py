"""Benchmarks train, choose and report on documents of three kinds that have nothing in common."""

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.parts import RUN, full_windows, shared_runs, split, weave, windows_record
from tests.folders import save_tiny
from upfit.output import Output
from upfit.text import Document
from upfit.text.windows import Window, make_windows
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.rows import TextRows
from upfit.uptrain.data.shards import Shards

LENGTH = 8


def document(number: int, words: int = 40) -> Document:
    return Document(" ".join(f"w{number}x{place}" for place in range(words)), str(number))


def test_a_document_and_its_copies_stand_in_one_part() -> None:
    text = [document(number) for number in range(60)]
    parts, again = split(text), split([*reversed(text), *text])
    for (name, part), (_, doubled) in zip(parts.items(), again.items(), strict=True):
        assert {d.text for d in part} == {d.text for d in doubled}, name
    texts = [d.text for _, part in parts.items() for d in part]
    assert sorted(texts) == sorted(d.text for d in text)
    assert len(parts.train) > 30 and len(parts.choose) > 1 and len(parts.report) > 1


def test_shared_runs_are_counted() -> None:
    first, second = document(1), document(2)
    assert shared_runs([first], [second]) == 0
    assert shared_runs([first], [second, first]) == 1
    half = Document(" ".join([*first.text.split()[: 2 * RUN - 1], *second.text.split()[: RUN - 1]]), "")
    assert shared_runs([half], [first]) == RUN / (2 * RUN - 1)


def window(number: int) -> Window:
    return Window(np.full(LENGTH, 100 + number), 0, "", number, 0, "text")


def test_woven_rows_are_the_rows_trained_on_and_the_windows_held_out(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for number, length in enumerate((100, 3, 61, 250, 17)):
        (tmp_path / "text" / f"{number}.txt").write_text(("abcdefg"[number:] * length)[:length])
    prepare([str(tmp_path / "text")], tmp_path / "train", str(model), "text", Output(quiet=True))
    held_out = [window(number) for number in range(4)]
    weave(tmp_path / "train", held_out, LENGTH, tmp_path / "woven")
    plain = TextRows(Shards(tmp_path / "train"), LENGTH, 0, 0)
    woven = TextRows(Shards(tmp_path / "woven"), LENGTH, len(held_out), 0)
    assert [woven.at(row).input_ids.tolist() for row in woven.holdout] == [w.ids.tolist() for w in held_out]
    assert [woven.at(row).supervised for row in woven.holdout] == [LENGTH - 1] * len(held_out), "no label of another row"
    assert len(woven.training) == plain.total == len(plain.training)
    for row, before in zip(woven.training, range(plain.total), strict=True):
        assert woven.at(int(row)).input_ids.tolist() == plain.at(before).input_ids.tolist()
        inside = slice(0, LENGTH - 1)
        assert woven.at(int(row)).labels[inside].tolist() == plain.at(before).labels[inside].tolist()


def test_windows_are_told_by_number_fullness_and_documents(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    part = [Document("ab" * 100, "long"), Document("abc" * 12, "short")]
    whole = full_windows(part, str(model), 64, 10)
    assert {len(w.ids) for w in whole} == {64} and {w.document for w in whole} == {0}
    windows = make_windows(part, AutoTokenizer.from_pretrained(model), 64, 10)
    record = windows_record(windows, 64)
    assert record["windows"] == record["full"] + 1 and record["documents"] == 2
    assert record["tokens"] == sum(len(w.ids) - 1 for w in windows)
