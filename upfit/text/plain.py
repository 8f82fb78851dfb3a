"""Plain text: a whole file as one document, or blocks spread over a file too large to be read whole."""

import codecs
import io
import os
from pathlib import Path
from typing import IO

from upfit.errors import UpfitError
from upfit.text.files import NotText, is_packed
from upfit.text.packed import opened

LARGEST = 256 * 2**20  # bytes of one document; a tokenizer takes a hundred times as much to read it
HEAD = 2**16  # is looked at before the rest is read: most files that are not text say so there
BLOCKS = 16  # places that a large file is read at
LEAST_BLOCK = 4096  # a page, which a disk reads at once anyway
TRIM = 16  # a block gives up to a 16th at each end to begin and end with whole lines, or else words
SPACES = b" \t\n\r\f\v"


def whole_text(path: Path) -> str:
    """The text of the file, without a byte-order mark, its lines ending in `\\n`.

    Raises NotText when it is not UTF-8 text, UpfitError when it has more than LARGEST bytes.
    """
    with opened(path) as (file, _):
        return decoded(_whole(file, path), path)


def _whole(file: IO[bytes], path: Path) -> bytes:
    head = file.read(HEAD)
    _check_head(head, path)
    size = LARGEST if is_packed(path) else os.fstat(file.fileno()).st_size
    content = head + file.read(size + 1 - len(head)) if size <= LARGEST else b""
    if size > LARGEST or len(content) > LARGEST:
        raise UpfitError(
            f"{path} is one document of more than {LARGEST // 2**20} MiB; split it, or give .jsonl with a document a line"
        )
    return content


def _check_head(head: bytes, path: Path) -> None:
    if b"\0" in head:
        raise NotText(f"{path} is not UTF-8 text (it holds zero bytes); give text files")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error) from error


def decoded(content: bytes, path: Path, start: int = 0) -> str:
    """Raises NotText when `content`, which begins at byte `start` of the file at `path`, is not UTF-8 text."""
    if b"\0" in content:
        raise NotText(f"{path} is not UTF-8 text (it holds zero bytes); give text files")
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error, start) from error


def _no_utf8(path: Path, error: UnicodeDecodeError, start: int = 0) -> NotText:
    where = f"{error.reason} at byte {start + error.start}"
    return NotText(f"{path} is not UTF-8 text ({where}); convert it first or leave it out")


def read_blocks(path: Path, size: int, share: int) -> list[str]:
    """The whole file, or when only `share` of its `size` bytes may be read, blocks spread evenly over it.

    Blocks begin and end with whole lines where lines are short, with whole words elsewhere; no byte is in two of them.
    """
    if share >= size:
        return [whole_text(path)]
    with opened(path) as (file, _):
        content = io.BytesIO(_whole(file, path)) if is_packed(path) else file
        count = max(1, min(BLOCKS, share // LEAST_BLOCK))
        edges = [index * size // count for index in range(count + 1)]
        return [_block(content, path, *pair, share // count) for pair in zip(edges, edges[1:], strict=False)]


def _block(file: IO[bytes], path: Path, first: int, last: int, most: int) -> str:
    """Up to `most` of the bytes from `first` to `last`."""
    margin = most // TRIM
    file.seek(first)
    content = file.read(min(last - first, most + margin))
    start = _first_break(content[:margin]) if first else 0
    content, rest = content[start : start + most], content[start + most :]
    if rest or file.read(1):
        content = _cut(content)
    return decoded(content, path, first + start)


def _first_break(edge: bytes) -> int:
    """Where the first line of `edge` begins, or else the first word, or else the first letter."""
    line = edge.find(b"\n") + 1
    words = [at + 1 for at, byte in enumerate(edge) if byte in SPACES] if not line else []
    letters = (at for at, byte in enumerate(edge) if byte & 0xC0 != 0x80)  # not inside of a character of several bytes
    return line or (words[0] if words else next(letters, 0))


def _last_break(edge: bytes) -> int:
    """How much to leave off `edge` for it to end with a whole line, or else a whole word, or else a whole letter."""
    line = edge.rfind(b"\n") + 1
    word = 0 if line else max(edge.rfind(bytes([space])) for space in SPACES) + 1
    return len(edge) - (line or word) if line or word else _torn(edge)


def _torn(edge: bytes) -> int:
    """How many bytes at the end of `edge` begin a character that is not whole."""
    for back in range(1, min(4, len(edge) + 1)):
        byte = edge[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character: its high bits say how many there are
            return back if back < 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) else 0
    return 0


def beginning(text: str, nbytes: int) -> str:
    """`text` up to `nbytes` bytes of UTF-8, ending with a whole line or word where there is one."""
    content = text.encode("utf-8")
    return text if len(content) <= nbytes else _cut(content[:nbytes]).decode("utf-8")


def pieces(text: str, nbytes: int) -> list[str]:
    """`text` in about equal pieces of about `nbytes` bytes of UTF-8 at most, cut as in `beginning`."""
    content, parts = text.encode("utf-8"), list[bytes]()
    size = -(-len(content) // max(1, -(-len(content) // nbytes)))
    while len(content) > 1.25 * size:  # the last piece takes the rest, so that none is a crumb
        parts.append(_cut(content[:size]))
        content = content[len(parts[-1]) :]
    return [part.decode("utf-8") for part in (*parts, content)]


def _cut(content: bytes) -> bytes:
    margin = max(len(content) // TRIM, 4)
    return content[: len(content) - _last_break(content[-margin:])]
