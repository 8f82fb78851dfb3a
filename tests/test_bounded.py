"""Files that are read whole are ordinary, of a bounded size, and told of in one line when they are not."""

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from upfit.bounded import LINE_BYTES, check_ordinary, read_bytes, read_json, read_lines, read_text, shaped
from upfit.errors import UpfitError

READERS: list[Callable[[Path], object]] = [
    lambda path: read_bytes(path, 100),
    lambda path: read_text(path, 100),
    lambda path: read_json(path, 100),
    lambda path: list(read_lines(path, 100)),
]


@pytest.fixture
def strange(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """What may stand where a file belongs."""
    found = {name: tmp_path / name for name in ("pipe", "socket", "folder", "zero", "nothing", "loop")}
    os.mkfifo(found["pipe"])
    found["folder"].mkdir()
    found["zero"].symlink_to("/dev/zero")
    found["nothing"].symlink_to(tmp_path / "gone")
    found["loop"].symlink_to(found["loop"])
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket is short
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
        yield found


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["pipe", "socket", "folder", "zero", "nothing", "loop"])
def test_what_is_no_file_is_refused_at_once(strange: dict[str, Path], name: str, read: Callable[[Path], object]) -> None:
    began = time.monotonic()
    with pytest.raises(UpfitError) as caught:
        read(strange[name])
    assert time.monotonic() - began < 1 and "\n" not in str(caught.value) and str(strange[name]) in str(caught.value)
    assert ("not an ordinary file" in str(caught.value)) == (name not in ("nothing", "loop"))


@pytest.mark.parametrize("read", READERS)
def test_no_more_is_read_than_the_bound(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "large"
    with open(path, "wb") as file:
        os.ftruncate(file.fileno(), 50 * 2**30)  # of which the disk holds nothing
    with pytest.raises(UpfitError, match=f"^{path} has 53687091200 bytes; at most 100 are read"):
        read(path)


def test_a_line_without_end_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"{}\n" + b"x" * (LINE_BYTES + 1))
    lines = read_lines(path)
    assert next(lines) == "{}"
    with pytest.raises(UpfitError, match=f"^{path} line 2 has more than"):
        next(lines)


def test_what_no_file_is_called(tmp_path: Path) -> None:
    for read in READERS:
        with pytest.raises(UpfitError, match=r"^'a\\x00b' is no name of a file"):
            read(Path("a\0b"))


def test_what_is_read_is_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("a\r\nö\n\n".encode())
    assert read_text(path, 100) == "a\r\nö\n\n" and list(read_lines(path)) == ["a", "ö", ""]
    assert stat.S_ISREG(check_ordinary(path).st_mode)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"9" * 5000, b'{"a": 1}x', b""])
def test_what_is_no_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UpfitError) as caught:
        read_json(path, 10_000)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_deep_nesting_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(UpfitError, match="nested too deeply"):
        read_json(path, 10**6)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("a\nb"), ValueError(), IndexError("no"), ZeroDivisionError()])
def test_records_of_another_shape_are_one_line(error: Exception) -> None:
    with pytest.raises(UpfitError, match="^x.json is not a record ") as caught, shaped("x.json is not a record"):
        raise error
    assert "\n" not in str(caught.value) and type(error).__name__ in str(caught.value)
    with pytest.raises(UpfitError, match="^as it is$"), shaped("x.json"):
        raise UpfitError("as it is")
