"""Entries of files that hold many documents: lines of JSON, values of a JSON file, and what text each holds.

An entry is parsed only when its text is wanted. `ahead`, where it is given, is called after every entry and returns the
position of the next byte that is wanted, so that a reader can skip what lies between; None ends the reading.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from upfit.errors import UpfitError
from upfit.text.files import form_of

LONGEST = 64 * 2**20  # bytes of one entry; Python takes some twenty times as much for the worst that JSON can say
CHUNK = 2**20
SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile("[\ud800-\udfff]")
SHOWN = 8  # field names in an error
Ahead = Callable[[int], int | None]


class Entry(NamedTuple):
    """`value` stands in the bytes `begin` to `end` of the content of `path`; as bytes it is JSON still to be read."""

    path: Path
    line: int  # 0 where it is not known
    begin: int
    end: int
    value: Any

    @property
    def where(self) -> str:
        if not self.line:
            return f"{self.path} at byte {self.begin}"
        return f"{self.path} {'row' if form_of(self.path) == 'parquet' else 'line'} {self.line}"


def text_of(entry: Entry, field: str, hint: str) -> str | None:
    """The text in `field`, None where that is null. Raises UpfitError, which ends with `hint`, where there is no such text."""
    value = parsed(entry) if isinstance(entry.value, bytes) else entry.value
    if isinstance(value, dict) and field in value and value[field] is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise UpfitError(f"{entry.where} has no text in {field!r} (found: {_shown(value)}); {hint}")
    return cleaned(value[field])


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return type(value).__name__
    names = [str(name)[:40] for name in value][: SHOWN + 1]
    return cleaned(", ".join(names[:SHOWN])) + (" ..." if len(names) > SHOWN else "")


def cleaned(text: str) -> str:
    """Without a byte-order mark, and with U+FFFD for halves of characters (lone surrogates), which no tokenizer takes."""
    text = text.removeprefix("\ufeff")
    try:
        text.encode("utf-8")  # far faster than a search, and nearly always all that is needed
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text


def parsed(entry: Entry) -> Any:
    """Raises UpfitError when the entry is not JSON."""
    try:
        return json.loads(entry.value.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start} of it"
        raise UpfitError(f"{entry.where} is not UTF-8 text ({where}); convert it first") from error
    except (ValueError, RecursionError) as error:
        raise UpfitError(f"{entry.where} is not JSON ({_reason(error)}); give one JSON object a line") from error


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def line_entries(file: IO[bytes], path: Path, ahead: Ahead | None = None) -> Iterator[Entry]:
    """Each line that says something. With `ahead`, `file` must be one that can seek.

    Raises UpfitError for a line of more than LONGEST bytes.
    """
    begin, number = 0, 1
    while line := file.readline(LONGEST + 1):
        entry = Entry(path, number, begin, begin + len(line), line)
        if len(line) > LONGEST:
            raise UpfitError(f"{entry.where} is longer than {LONGEST // 2**20} MiB; give shorter documents")
        if not line.isspace():
            yield entry
        begin, number = entry.end, number + (number > 0)
        offset = begin if ahead is None else ahead(begin)
        if offset is None:
            return
        if offset > begin:
            begin, number = line_start(file, offset, begin), 0
            file.seek(begin)


def line_start(file: IO[bytes], offset: int, least: int) -> int:
    """Where the line begins that byte `offset` is in; lines do not begin before `least`."""
    while offset > least:
        begin = max(least, offset - CHUNK)
        file.seek(begin)
        newline = file.read(offset - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        offset = begin
    return least


def value_entries(file: IO[bytes], path: Path) -> Iterator[Entry]:
    """What a .json file holds, whichever way: the items of an array, or values one after the other (lines, or a single one).

    Raises UpfitError for what is not JSON, or an entry of more than LONGEST bytes.
    """
    source = _Source(file, path)
    array = source.next() == "["
    source.at += array
    while mark := source.next():
        if array and mark == "]":
            source.at += 1
            if source.next():
                raise source.error("has something behind its array")
            return
        yield source.value()
        if array and source.next() == ",":
            source.at += 1
        elif array and source.next() != "]":
            raise source.error("is cut short, or lacks a comma")
    if array:
        raise source.error("is cut short: its array does not end")


class _Source:
    """Characters of a JSON file, as many at a time as the next value takes."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.decoder, self.scan = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
        self.text, self.at, self.whole = "", 0, False
        self.line, self.byte, self.counted = 1, 0, 0  # of the character at `counted`
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> None:
        """Read on: as much again as is there, so that a long value is not begun too many times."""
        self.where()
        self.text, self.at, self.counted = self.text[self.at :], 0, 0
        content = self.file.read(max(CHUNK, len(self.text)))
        self.whole = not content
        try:
            self.text += self.decoder.decode(content, final=self.whole)
        except UnicodeDecodeError as error:
            raise self.error(f"or what follows is not UTF-8 text ({error.reason})") from error

    def where(self) -> tuple[int, int]:
        """Line and byte of the place that reading has come to."""
        passed = self.text[self.counted : self.at]
        self.line += passed.count("\n")
        self.byte += len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        self.counted = self.at
        return self.line, self.byte

    def next(self) -> str:
        """The next character that is no space, which stays; '' at the end."""
        while True:
            match = SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or self.whole:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Entry:
        line, begin = self.where()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
                if end + 4 < len(self.text) or self.whole:  # else it may be a number that goes on, such as 1e+5
                    break
            except json.JSONDecodeError as error:
                if self.whole or self._is_wrong(error):
                    raise self.error(f"is not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits
                raise self.error(f"is not JSON ({_reason(error)})") from error
            if len(self.text) - self.at >= LONGEST:
                raise self.error(f"holds a value longer than {LONGEST // 2**20} MiB, or is not JSON")
            self.more()
        self.at = end
        return Entry(self.path, line, begin, self.where()[1], value)

    def _is_wrong(self, error: json.JSONDecodeError) -> bool:
        """Whether more text would not help: the error is not that a string goes on, or something at the very end."""
        return not error.msg.startswith("Unterminated") and error.pos < len(self.text) - 16

    def error(self, what: str) -> UpfitError:
        return UpfitError(f"{self.path} line {self.where()[0]} {what}; mend it or leave it out")
