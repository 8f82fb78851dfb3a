"""Windows of text that `upfit evaluate` measures on."""

from pathlib import Path

import pytest

from tests.test_evaluate import PROSE, documents, tiny_tokenizer
from upfit import text as texts
from upfit.text import Document, file_documents, python_documents, read_blocks
from upfit.text.windows import digest, make_windows, prefix_ids, retokenised, same_tokens, spread


@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_disjoint_and_inside_their_documents(bos: bool) -> None:
    tokenizer, length = tiny_tokenizer(bos=bos), 48
    assert prefix_ids(tokenizer) == ([0] if bos else [])
    windows = make_windows(documents(), tokenizer, length, 1000)
    ends: dict[int, int] = {}
    exact = 0
    for window in windows:
        text = documents()[window.document].text
        assert text[window.start : window.start + len(window.text)] == window.text
        assert window.start == ends.get(window.document, 0)
        ends[window.document] = window.start + len(window.text)
        assert len(window.ids) == length or (len(window.ids) < length and len(text) == len(window.text))
        assert bool(window.ids[0] == 0) is bos
        scored = window.ids[1:].tolist()
        if "\ufffd" not in tokenizer.decode(scored):  # else the cut is inside a character, which counts for one of the two
            # byte-level tokens: a letter stands for a byte
            assert window.scored_bytes == sum(map(len, tokenizer.convert_ids_to_tokens(scored)))
            exact += 1
    assert exact > len(windows) / 2
    full = [w for w in windows if w.document == 5]
    assert len(full) == len(tokenizer(documents()[5].text, add_special_tokens=False)["input_ids"]) // (length - bos)
    assert len(documents()[5].text) - ends[5] < 4 * length


def test_windows_are_the_same_each_time_and_spread_over_all() -> None:
    tokenizer = tiny_tokenizer()
    first, again = (make_windows(documents(), tokenizer, 32, 10) for _ in range(2))
    assert digest(first) == digest(again) and len(first) == 10
    assert digest(first) != digest(first[:-1])
    assert len({window.document for window in first}) >= 3
    chosen = spread(1000, 10, 0)
    assert [i // 100 for i in chosen] == list(range(10)) and chosen != [100 * i for i in range(10)]
    assert spread(3, 10, 0) == [0, 1, 2] and spread(1000, 0, 0) == []


def test_kinds_of_text_get_equal_shares() -> None:
    long = [Document(PROSE * 40, "p", "prose"), Document(PROSE * 8, "c", "code")]
    kinds = [window.kind for window in make_windows(long, tiny_tokenizer(), 32, 10)]
    assert kinds.count("prose") == kinds.count("code") == 5


def test_retokenised_windows_hold_the_same_text() -> None:
    first, second = tiny_tokenizer(), tiny_tokenizer(merges=5, bos=True)
    windows = make_windows(documents(), first, 48, 8)
    assert same_tokens(windows, first, tiny_tokenizer()) and not same_tokens(windows, first, second)
    others = retokenised(windows, second)
    assert [w.text for w in others] == [w.text for w in windows]
    assert all(second.decode(w.ids[1:].tolist()) == w.text for w in others if "�" not in second.decode(w.ids[1:].tolist()))
    assert all(w.scored_bytes == len(w.text.encode()) for w in others)


def test_files_folders_and_jsonl_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    (tmp_path / "weights.bin").write_bytes(b"\0\1")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    assert [document.text for document in file_documents([str(tmp_path)], 10**6)] == ["one", "two", "second"]


def test_large_files_are_read_in_whole_lines_from_all_over(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    lines = [f"line {i} " + "x" * (i % 90) for i in range(20_000)]
    path.write_text("\n".join(lines))
    size = path.stat().st_size
    for share in (40_000, size - 10):
        read = [line for block in read_blocks(path, size, share) for line in block.splitlines()]
        numbers = [int(line.split()[1]) for line in read]
        assert set(read) <= set(lines) and numbers == sorted(set(numbers)) and sum(map(len, read)) <= share
        assert numbers[0] == 0 and numbers[-1] > 17_500


def test_default_text_is_half_code() -> None:
    found = python_documents()
    sizes = {kind: sum(len(d.text) for d in found if d.kind == kind) for kind in ("prose", "code")}
    assert len([d for d in found if d.kind == "code"]) == len(texts.PYTHON_FILES)
    assert 0.5 < sizes["prose"] / sizes["code"] < 2
