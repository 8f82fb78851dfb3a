"""Where a result is to be written: what is there already, full and failing disks, all in one line."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny
from tests.test_bad_input import attempt
from upfit.checkpoint.output_folder import check_output
from upfit.errors import UpfitError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source")


def test_output_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in attempt(folder, tmp_path / "out")


def test_output_is_not_empty(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "--overwrite" in attempt(folder, tmp_path / "out")
    assert "Upfit did not write it" in attempt(folder, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("where", ["source", "source/inside", "."])
def test_output_overlaps_the_source(folder: Path, tmp_path: Path, where: str) -> None:
    assert "overlaps the source" in attempt(folder, tmp_path / where)


def test_small_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    assert "free some space" in attempt(folder, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**19, 0, 4 * 10**18))
    with pytest.raises(UpfitError, match=r" has 4000000000\.00 GB free, the output needs 5000000000\.00 GB; "):
        check_output(tmp_path / "out", [], 5 * 10**18, False)


@pytest.mark.parametrize(
    ("code", "word"), [("ENOSPC", "is full"), ("EDQUOT", "is full"), ("EIO", "was not written"), ("EROFS", "was")]
)
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync", "preadv", "replace"])
def test_disk_that_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, word: str, call: str
) -> None:
    """One line, with the name of a file, whatever the disk says and wherever it says it."""
    import errno

    from upfit.convert import conversion

    original = conversion.write_shards

    def failing(*_: object) -> int:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    def later(*work: Any) -> None:  # checks of the source are behind us
        if call == "replace":
            original(*work)
        monkeypatch.setattr(os, call, failing)
        if call != "replace":
            original(*work)

    monkeypatch.setattr(conversion, "write_shards", later)
    message = attempt(folder, tmp_path / "out", keeps=True)
    assert word in message and (call == "replace" or "model.safetensors" in message)


def test_disk_that_fills_while_writing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert "is full" in attempt(folder, tmp_path / "out", keeps=True)


def test_unknown_dtype(folder: Path, tmp_path: Path) -> None:
    assert "--dtype 'int4'" in attempt(folder, tmp_path / "out", dtype="int4")
