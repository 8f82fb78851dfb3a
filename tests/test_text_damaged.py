"""Damaged, strange and huge files of text are told in one line, in bounded memory."""

import gzip
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_text import BOTH, Notes, refused, rows, sampled, streamed, words, written
from upfit.calibration.sample import check_texts
from upfit.errors import UpfitError
from upfit.text import entries, plain
from upfit.text.files import local_inputs
from upfit.text.packed import FREE_BYTES


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


GOOD = rows([f"line {number}" for number in range(2000)]).encode()
NOISE = rows([random.Random(0).randbytes(3000).hex()]).encode()
BROKEN: dict[str, tuple[bytes, str]] = {
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-40], "damaged or cut short"),
    "cut.txt.gz": (gzip.compress(GOOD)[:-40], "damaged or cut short"),
    "cut.json.gz": (gzip.compress(GOOD)[:-40], "damaged or cut short"),
    "plain.jsonl.gz": (GOOD, "no gzip file"),
    "flipped.jsonl.gz": (flipped(gzip.compress(NOISE), 800), "damaged or cut short"),
    "behind.jsonl.gz": (gzip.compress(GOOD) + b"something", "damaged or cut short"),
    "json.jsonl": (b'{"text": "x"}\n{"text": \n', "json.jsonl line 2 is not JSON"),
    "latin.jsonl": (b'{"text": "x"}\n{"text": "\xe9"}\n', "latin.jsonl line 2 is not UTF-8 text"),
    "utf16.jsonl": ('{"text": "x"}'.encode("utf-16"), "line 1 is not UTF-8 text"),
    "deep.jsonl": (b'{"text": ' + b"[" * 10**5, "deep.jsonl line 1 is not JSON (nested too deeply)"),
    "digits.jsonl": (b'{"n": ' + b"9" * 10**5 + b"}", "digits.jsonl line 1 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1 has no text in 'text' (found: list)"),
    "number.jsonl": (b'{"text": 1}\n', "no text in 'text'"),
    "missing.jsonl": (b'{"text": "x"}\n{"\\ud800": "x"}\n', "line 2 has no text in 'text' (found: �)"),
    "cut.json": (b'[{"text": "x"},\n{"text": "y"}', "cut.json line 2 is cut short"),
    "comma.json": (b'[{"text": "x"}\n{"text": "y"}]', "comma.json line 2 is cut short, or lacks a comma"),
    "behind.json": (b'[{"text": "x"}]\n\n]', "behind.json line 3 has something behind"),
    "wrong.json": (b'{"text": "x"}\n{"text": oops}' + b" " * 100, "wrong.json line 2 is not JSON"),
    "deep.json": (b'{"text": "x"}\n' + b"[" * 10**5, "deep.json line 2 is not JSON (nested too deeply)"),
    "digits.json": (b'{"text": "x"}\n' + b"9" * 10**5 + b"\n", "digits.json line 2 is not JSON"),
    "latin.json": (b'[{"text": "\xe9"}]', "not UTF-8 text"),
    "latin.txt": (b"ol\xe9", "latin.txt is not UTF-8 text (unexpected end of data at byte 2)"),
    "utf16.txt": ("text".encode("utf-16"), "not UTF-8 text"),
    "zero.txt": (b"a\0b", "zero bytes"),
    "picture.txt.gz": (gzip.compress(b"\x89PNG\0"), "zero bytes"),
    "none.parquet": (b"PAR1 but not really", "none.parquet is no parquet file, or damaged"),
    "empty.parquet": (b"", "empty.parquet is no parquet file, or damaged"),
}


@pytest.mark.parametrize("read", BOTH)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_damaged_is_named_in_one_line(tmp_path: Path, read: Any, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    error = refused(read, tmp_path / name)
    assert message in error and str(tmp_path / name) in error and len(error) < 400


@pytest.mark.parametrize("read", BOTH)
def test_a_damaged_parquet_file_is_named_in_one_line(tmp_path: Path, read: Any) -> None:
    content = written(tmp_path, "parquet", [words("s", 500, seed) for seed in range(50)]).read_bytes()
    for damaged in (content[:-100], content[:200] + bytes(255 - byte for byte in content[200:260]) + content[260:]):
        (tmp_path / "text.parquet").write_bytes(damaged)
        assert "text.parquet is no parquet file, or damaged" in refused(read, tmp_path / "text.parquet")


def test_files_that_are_not_text_are_left_out_of_a_folder_and_damage_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0")
    notes = Notes()
    assert streamed(tmp_path, output=notes) == ["good"] and notes.notes[0].startswith("left out: 2 files that")
    notes = Notes()
    assert sampled(tmp_path, output=notes) == ["good"] and notes.notes[0].startswith("left out: 1 file that is")
    for name in ("d.jsonl.gz", "d.json.gz", "d.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(GOOD)[:-9])
        for read in BOTH:
            assert f"{name} is no gzip file, damaged or cut short" in refused(read, tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("read", [lambda path: local_inputs([str(path)]), sampled, lambda path: check_texts([str(path)])])
def test_only_ordinary_files_are_read(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
    for path, kind in ((tmp_path / "pipe.txt", "a pipe"), (tmp_path / "s", "a socket"), (Path("/dev/zero"), "a device")):
        assert f"{path} is not an ordinary file but {kind}" in refused(read, path)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    refused(read, tmp_path / "self.txt")


def test_in_a_folder_what_is_no_ordinary_file_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "elsewhere").write_text("linked")
    (folder / "a.txt").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert streamed(path) == sampled(path) == ["linked"]


@pytest.mark.parametrize("name", ["nowhere", "sub/data.jsonl", "org/name.parquet", "empty"])
def test_what_is_not_there_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("x")
    for check in (lambda: local_inputs([name]), lambda: check_texts([name]), lambda: sampled(Path(name))):
        with pytest.raises(UpfitError, match="not here|no file|no text|no files"):
            check()
    assert local_inputs(["org/name", "org/name:config"]) == []


RUN = """
import resource, sys
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.text import file_documents
from upfit.text.corpus import documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    if sys.argv[1] == "streamed":
        sum(1 for _ in documents(sys.argv[2:], "text", Output(quiet=True)))
    else:
        file_documents(sys.argv[2:], 131072)
    print("read", end=" ")
except UpfitError as error:
    print(error, end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def huge(folder: Path, name: str) -> Path:
    path = folder / name
    with path.open("wb") as file:
        file.write(b"a b\n" * 2**15 if name == "sparse.txt" else b'{"text": "')
        file.truncate(5 * 10**9)
    if name == "bomb.jsonl.gz":
        with gzip.open(path, "wb", compresslevel=9) as packed:
            for _ in range(600):
                packed.write(b'{"text": "' + b"x" * 10**6 + b'"}\n')
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name,message", [("sparse.txt", "256 MiB"), ("line.jsonl", "64 MiB"), ("bomb.jsonl.gz", "200 times")])
@pytest.mark.parametrize("how", ["streamed", "sampled"])
def test_memory_is_bounded_whatever_a_file_unpacks_to(tmp_path: Path, name: str, message: str, how: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", RUN, how, str(huge(tmp_path, name))]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert (message if (name, how) != ("sparse.txt", "sampled") else "zero bytes") in answer
    assert int(answer.split()[-1]) < 300, "MB"


def test_a_document_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "LARGEST", 1000)
    monkeypatch.setattr(entries, "LONGEST", 1000)
    for name, fits in (("a.txt", 1000), ("a.txt.gz", 1000), ("a.jsonl", 987)):
        for nbytes in (fits, fits + 1):
            content = (rows(["x" * nbytes]) if ".jsonl" in name else "x" * nbytes).encode()
            (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
            if nbytes == fits:
                assert streamed(tmp_path / name) == ["x" * nbytes]
            else:
                assert str(tmp_path / name) in refused(streamed, tmp_path / name)
    monkeypatch.setattr(plain, "LARGEST", 3 * 2**20)
    (tmp_path / "a.txt").write_bytes(b"x" * (3 * 2**20 + 1))
    assert "is one document of more than 3 MiB; split it" in refused(streamed, tmp_path / "a.txt")


def test_honest_text_packs_well(tmp_path: Path) -> None:
    """A line again and again packs to less than a hundredth; that is no reason to refuse it."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows(["past a house the river"] * 50_000).encode()))
    assert 100 * (tmp_path / "a.jsonl.gz").stat().st_size < 50_000 * 36 < FREE_BYTES
    assert len(streamed(tmp_path / "a.jsonl.gz")) == 50_000
