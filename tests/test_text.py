"""One reader of the user's text for all verbs: every document counts by its length, every form is read, nothing else is."""

import gzip
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.folders import letter_tokenizer
from upfit.calibration.sample import check_texts, make_sample, read_documents
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.text import content_stamp, entries, file_documents
from upfit.text.corpus import documents
from upfit.text.documents import PYTHON_FILES, library_documents
from upfit.text.files import local_inputs
from upfit.text.plain import pieces, read_blocks
from upfit.text.reader import Reader
from upfit.text.sample import Quota
from upfit.text.tokenizer import load_tokenizer

QUIET = Output(quiet=True)
BUDGET = 131_072
PLENTY = 10**9


class Notes(Output):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def streamed(*paths: Path, field: str = "text", output: Output = QUIET) -> list[str]:
    """What prepare and synth read."""
    return [text for text, _ in documents([str(path) for path in paths], field, output)]


def sampled(*paths: Path, budget: int = PLENTY, output: Output = QUIET) -> list[str]:
    """What evaluate, calibrate and convert --calibration read."""
    return [document.text for document in file_documents([str(path) for path in paths], budget, output=output)]


BOTH = [streamed, sampled]


def refused(read: Any, *paths: Path) -> str:
    with pytest.raises(UpfitError) as caught:
        read(*paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def words(kind: str, nbytes: int, seed: int) -> str:
    return f"{kind}{seed} " + " ".join(random.Random(seed).choices(("river", "stone", "rose"), k=nbytes // 6))


# Long documents count for what they are


def mixture(long: int, count: int, short_ones: int, seed: int) -> list[str]:
    texts = [words("L", long, index) for index in range(count)] + [words("s", 100, index) for index in range(short_ones)]
    random.Random(seed).shuffle(texts)
    return texts


def share_of_long(texts: list[str]) -> float:
    return sum(len(text) for text in texts if text[0] == "L") / sum(map(len, texts))


@pytest.mark.parametrize("long,count,short_ones", [(20_000, 40, 300), (20_000, 25, 5000), (400_000, 3, 4000)])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_the_share_of_long_documents_is_what_it_is_in_the_text(
    tmp_path: Path, long: int, count: int, short_ones: int, form: str
) -> None:
    shares, true = [], 0.0
    for seed in range(4):
        texts = mixture(long, count, short_ones, seed)
        true = share_of_long(texts)
        path = written(tmp_path, form, texts)
        read = sampled(path, budget=BUDGET)
        assert 0.8 * BUDGET < sum(map(len, read)) <= BUDGET and len(set(read)) == len(read)
        assert all(any(whole.startswith(text) for whole in texts) for text in random.Random(0).sample(read, 5))
        shares.append(share_of_long(read))
    assert abs(sum(shares) / 4 - true) < 0.15


def written(folder: Path, form: str, texts: list[str]) -> Path:
    from pyarrow import Table, parquet

    path = folder / f"text.{form}"
    if form == "parquet":
        parquet.write_table(Table.from_pydict({"text": texts}), path, row_group_size=100)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(rows(texts).encode(), compresslevel=1))
    else:
        path.write_text(rows(texts) if form == "jsonl" else json.dumps([{"text": text} for text in texts]))
    return path


def test_seeking_in_a_file_reads_what_streaming_it_does(tmp_path: Path) -> None:
    texts = mixture(30_000, 20, 3000, 0)
    read = [sampled(written(tmp_path, form, texts), budget=50_000) for form in ("jsonl", "jsonl.gz")]
    assert read[0] == read[1] == sampled(tmp_path / "text.jsonl", budget=50_000)


def test_documents_longer_than_a_block_are_read_whole(tmp_path: Path) -> None:
    texts = [words("L", 20_000, seed) for seed in range(40)]
    read = sampled(written(tmp_path, "jsonl", texts), budget=BUDGET)
    numbers = [int(text.split()[0][1:]) for text in read]
    assert all(text in texts for text in read[:-1]) and numbers[0] == 0 and numbers[-1] >= 32
    assert len(read) == 7 and all(0 < b - a < 9 for a, b in zip(numbers, numbers[1:], strict=False)), "spread evenly"


def test_one_document_longer_than_the_budget_gives_its_beginning(tmp_path: Path) -> None:
    text = words("L", 3_000_000, 0)
    (read,) = sampled(written(tmp_path, "jsonl", [text]), budget=BUDGET)
    assert text.startswith(read) and 0.9 * BUDGET < len(read) <= BUDGET and text[len(read) - 1] == " "


def test_many_small_files_all_give_documents(tmp_path: Path) -> None:
    for number in range(200):
        texts = [words("L", 6000, number * 10 + index) for index in range(4)]
        (tmp_path / f"{number:03}.jsonl").write_text(rows(texts))
    read = file_documents([str(tmp_path)], BUDGET)
    numbers = [int(Path(document.name).stem) for document in read]
    assert 20 < len(read) < 30 and all(0 < b - a < 20 for a, b in zip(numbers, numbers[1:], strict=False))
    assert len({document.name for document in file_documents([str(tmp_path)], 4_000_000)}) == 200


@pytest.mark.parametrize("letters", ["past a small stone house ", "東京", "🙂é"])
def test_a_text_of_one_line_gives_its_text(tmp_path: Path, letters: str) -> None:
    path = tmp_path / "one.txt"
    path.write_text(letters * (400_000 // len(letters.encode())))
    size = path.stat().st_size
    blocks = read_blocks(path, size, BUDGET)
    assert len(blocks) == 16 and 0.9 * BUDGET < sum(len(block.encode()) for block in blocks) <= BUDGET
    assert all(block in path.read_text() for block in blocks)
    if " " in letters:
        assert all(block.startswith(tuple(letters.split())) and block.endswith(" ") for block in blocks)
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert sampled(path.with_suffix(".txt.gz"), budget=BUDGET) == sampled(path, budget=BUDGET) == blocks


@pytest.mark.parametrize("share", [1, 3000, 8191, 8192, 40_000, 65_536, 200_000])
def test_a_large_file_is_read_at_sixteen_places_or_fewer_and_never_in_crumbs(tmp_path: Path, share: int) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("past a small stone house\n" * 16_000)
    blocks = read_blocks(path, path.stat().st_size, share)
    assert len(blocks) == max(1, min(16, share // 4096))
    assert sum(map(len, blocks)) <= share and all(len(block) > 0.9 * share / len(blocks) - 25 for block in blocks)


@pytest.mark.parametrize(("count", "nbytes"), [(4000, 100), (200, 2000), (40, 10_000)])
def test_a_budget_is_spent_evenly_along_the_text(count: int, nbytes: int) -> None:
    """Of two files as one: at the end of every block what was due is spent, to a piece, and in the end all of it."""
    total = count * nbytes
    quota, spent, place = Quota(BUDGET, total), [0], 0
    for size in (total // 4, total - total // 4):
        quota.enter(size)
        assert quota.share == size * BUDGET // total
        for begin in range(0, size, nbytes):
            part = quota.take(begin, begin + nbytes)
            assert 0 <= part <= nbytes
            place += nbytes
            spent.append(spent[-1] + part)
            block = size / quota.blocks * BUDGET / total
            assert abs(spent[-1] - BUDGET * place / total) <= min(quota.piece, nbytes) + block
    assert spent[-1] == quota.spent and BUDGET - min(quota.piece, nbytes) <= spent[-1] <= BUDGET


def test_rows_of_a_table_are_told_by_their_numbers_and_places(tmp_path: Path) -> None:
    """Whatever groups of them are skipped."""
    texts = [f"row {number} " + "x" * (number % 7) for number in range(1, 351)]
    path, reader = written(tmp_path, "parquet", texts), Reader()
    sizes = reader.sizes(path)
    places = list(itertools.accumulate(map(len, texts), initial=0))
    for wanted in ([0, 1, 2, 3], [1, 3], [3], [0, 2], []):
        starts = [places[100 * group] for group in wanted]

        def ahead(at: int, starts: list[int] = starts) -> int | None:
            return next((start for start in starts if start >= at), None)

        read = list(reader.entries(path, sizes, ahead))
        numbers = [number for group in wanted for number in range(100 * group + 1, min(100 * group + 101, 351))]
        assert [entry.value["text"] for entry in read] == [texts[number - 1] for number in numbers]
        assert [(entry.line, entry.begin, entry.end) for entry in read] == [(n, places[n - 1], places[n]) for n in numbers]


def test_pieces_are_the_whole_text() -> None:
    text = words("L", 100_000, 0) + "東京" * 5000
    for nbytes in (1000, 4096, 60_000, 10**6):
        parts = pieces(text, nbytes)
        lengths = [len(part.encode()) for part in parts]
        assert "".join(parts) == text and 0.4 * nbytes < min(lengths) <= max(lengths) < 1.3 * nbytes or len(parts) == 1


def test_long_documents_count_in_the_windows_of_a_calibration(tmp_path: Path) -> None:
    """Half of the text is in one document of 400 kB: about half of the windows are, too, and not a piece of it."""
    tokenizer = letter_tokenizer()
    texts = ["river " * 66_000, *("stone " * 20 for _ in range(3300))]
    (tmp_path / "a.jsonl").write_text(rows(texts))
    sample = make_sample(read_documents([str(tmp_path / "a.jsonl")], 20_000), tokenizer, 20_000, 128, {})
    (windows,) = sample.windows.values()
    v, n = (windows.flatten().tolist().count(tokenizer.convert_tokens_to_ids(letter)) for letter in "vn")
    assert 0.35 < v / (v + n) < 0.65


def test_a_calibration_reads_so_much_of_a_text_for_each_token(tmp_path: Path) -> None:
    """Twice eight bytes: what is left over by the cut to windows has to be made up for, and a token is seldom longer."""
    for form in ("jsonl", "txt"):
        path = tmp_path / f"text.{form}"
        texts = [words("s", 100, seed) for seed in range(900)]
        path.write_text(rows(texts) if form == "jsonl" else "\n".join(texts))
        read = sum(len(document.text) for document in read_documents([str(path)], 2000))
        assert 0.8 * 32_000 < read <= 32_000, form


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "parquet", "txt"])
def test_a_budget_of_just_the_text_reads_all_of_it(tmp_path: Path, form: str) -> None:
    """Also where a document begins in the very middle of an odd number of bytes, which two blocks would part."""
    odd = ["x" * 87] * 81 + ["x" * 88]  # each a line of 100 bytes, the last one of 101
    for texts in (odd, mixture(3000, 5, 40, 0)):
        path = tmp_path / "text.txt"
        if form == "txt":
            path.write_text("\n".join(texts))
        else:
            path = written(tmp_path, form, texts)
        total = sum(Reader().sizes(path))
        assert sampled(path, budget=total) == sampled(path)
        assert sampled(path, budget=total // 2) != sampled(path)


def test_what_models_learn_from_is_not_what_they_are_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a usual size, none of which is among those of `python_documents`."""
    sizes = {"large.py": 200_000, "largest.py": 199_999, "small.py": 2000, "stub.py": 1999, PYTHON_FILES[0]: 9000}
    sizes |= {"room/inner.py": 9000, "test/inner.py": 9000}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#" * size)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert [document.name for document in library_documents()] == ["largest.py", "room/inner.py", "small.py"]


# Forms


@pytest.mark.parametrize("read", BOTH)
def test_every_form_gives_the_same_documents(tmp_path: Path, read: Any) -> None:
    texts = ["one\ntwo", "Größe 東京", "three"]
    lines = rows(texts).encode()
    contents = {
        "a.jsonl": lines,
        "b.JSONL": lines,
        "c.ndjson": lines.replace(b"\n", b"\r\n\r\n"),
        "d.json": lines,
        "e.json": json.dumps([{"text": text} for text in texts], indent=2).encode(),
        "f.JSON": "\n".join(json.dumps({"id": 1, "text": text}, indent=1, ensure_ascii=False) for text in texts).encode(),
        "g.json": b"[" + b",".join(lines.splitlines()) + b"]\n",
        "h.jsonl": b"\xef\xbb\xbf" + lines,
        "i.json": b"\xef\xbb\xbf" + lines,
    }
    contents |= {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == texts, name
    (tmp_path / "one.json").write_text(json.dumps({"text": texts[1]}, indent=2))
    assert read(tmp_path / "one.json") == [texts[1]]
    assert len(read(tmp_path)) == 1 + 3 * len(contents)


def test_parquet_is_text_for_every_verb(tmp_path: Path) -> None:
    assert streamed(written(tmp_path, "parquet", ["a b", "c"])) == sampled(tmp_path / "text.parquet") == ["a b", "c"]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "jsonl.gz", "parquet"])
def test_documents_stand_for_all_bytes_of_their_file(tmp_path: Path, form: str, count: int) -> None:
    """So that a bar over the bytes of all files ends where they do."""
    texts = [words("L", 900, seed) for seed in range(count)]
    path = written(tmp_path, form, texts) if form != "txt" else tmp_path / "text.txt"
    if form == "txt":
        path.write_text(texts[0])
    sizes = [nbytes for _, nbytes in documents([str(path)], "text", QUIET)]
    assert path.stat().st_size - count < sum(sizes) <= path.stat().st_size and len(sizes) == (1 if form == "txt" else count)


@pytest.mark.parametrize("read", BOTH)
def test_plain_text_comes_without_mark_and_with_plain_line_ends(tmp_path: Path, read: Any) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    assert read(tmp_path) == ["one\ntwo\n"] * 2


def test_values_of_a_json_file_may_be_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "CHUNK", 7)
    texts = ["x" * 50, "", 'é\\ "quoted" [,]{}', "1e5"]
    values = [{"n": 1.5e3, "text": text, "more": [1, {"a": None}]} for text in texts]
    for number, content in enumerate((json.dumps(values), "\n".join(map(json.dumps, values)), json.dumps(values, indent=3))):
        (tmp_path / f"{number}.json").write_text(content)
        assert streamed(tmp_path / f"{number}.json") == texts


def test_the_field_is_named_by_prepare_and_synth(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).write_text('{"body": "x", "text": "y"}\n')
        assert streamed(tmp_path / name, field="body") == ["x"] and sampled(tmp_path / name) == ["y"]
        assert "no text in 'other' (found: body, text); name the field with --field" in refused(
            lambda path: streamed(path, field="other"), tmp_path / name
        )


def test_a_json_file_of_something_else_is_left_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}\n')
    (tmp_path / "with_comments.json").write_text("// no JSON\n{}")
    (tmp_path / "empty.json").write_text("")
    for read in BOTH:
        notes = Notes()
        assert read(tmp_path, output=notes) == ["code"]  # type: ignore[operator]
        (note,) = notes.notes
        assert note.startswith("left out: 2 files that are not text, e.g.") and "package.json line 1 has no text" in note
        assert "found: name" in refused(read, tmp_path / "package.json")
    (tmp_path / "a.py").unlink()
    assert "holds no text that can be read" in refused(streamed, tmp_path) and "left" not in refused(sampled, tmp_path)


def test_nulls_are_left_out_and_counted_once(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    (tmp_path / "b.json").write_text('[{"text": null}, {"text": "y"}]')
    parquet.write_table(Table.from_pydict({"text": [None, "z", None]}), tmp_path / "c.parquet")
    for read in BOTH:
        notes = Notes()
        assert read(tmp_path, output=notes) == ["x", "y", "z"]  # type: ignore[operator]
        assert notes.notes == [f"left out: 4 entries have no text (null) in 'text', e.g. {tmp_path}/a.jsonl line 2"]


@pytest.mark.parametrize("read", BOTH)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_halves_of_characters_become_u_fffd(tmp_path: Path, read: Any, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a \\ud83d b \\ude00\\ud83d \\ud83d\\ude00"}\n{"text": "\\udfff"}\n')
    assert read(tmp_path / name) == ["a � b �� 😀", "�"]


@pytest.mark.parametrize("read", BOTH)
def test_a_byte_order_mark_is_dropped_wherever_a_text_begins(tmp_path: Path, read: Any) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\n\ufeff{"text": "\ufeffb"}\n{"text": "\\ufeffc"}\n', "utf-8")
    (tmp_path / "b.json").write_text('\ufeff[{"text": "\\ufeffd"}]', "utf-8")
    (tmp_path / "c.txt").write_text("\ufeffe", "utf-8")
    assert read(tmp_path) == ["a", "b", "c", "d", "e"]


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    for name in (Path("~"), Path("~/a.txt")):
        assert "x" in streamed(name) and "x" in sampled(name) and local_inputs([str(name)])
    check_texts(["~/a.txt"])
    assert load_tokenizer("~/model").eos_token_id is not None


# What is no text


# Only ordinary files, and only so much of them


# Identity


def test_a_stamp_is_of_the_content(tmp_path: Path) -> None:
    small, large = tmp_path / "a.txt", tmp_path / "b.txt"
    small.write_text("one")
    large.write_bytes(os.urandom(9 * 2**20))
    files = [small, large]
    stamp = content_stamp(files)
    assert stamp == content_stamp(files) and len(stamp) == 64
    assert len({stamp, content_stamp([small]), content_stamp([large, small]), content_stamp([])}) == 4
    for path, content in ((small, b"two"), (large, os.urandom(9 * 2**20))):
        state, before = path.stat(), path.read_bytes()
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert content_stamp(files) != stamp, "replaced by text of the same size and time"
        path.write_bytes(before)
    small.touch()
    large.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert content_stamp(files) != stamp
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UpfitError, match="a pipe"):
        content_stamp([tmp_path / "pipe"])


def test_a_small_file_that_was_copied_is_the_same_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    stamp = content_stamp([path])
    path.rename(tmp_path / "old")
    path.write_text("one")
    assert content_stamp([path]) == stamp
