"""One reader of files for all verbs: what documents a file holds, and how many bytes of text it has."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from upfit.bounded import check_ordinary
from upfit.errors import UpfitError
from upfit.output import Output
from upfit.text.entries import Ahead, Entry, line_entries, text_of, value_entries
from upfit.text.files import FIELD, NotText, form_of, is_packed
from upfit.text.packed import Damaged, Growth, opened, unpacked_size
from upfit.text.plain import whole_text
from upfit.text.tables import parquet_entries, parquet_rows, parquet_sizes

HINT = "name the field with --field"


@dataclasses.dataclass
class Reader:
    """Reads documents of the files' `field`, and keeps account of what it leaves out; `hint` ends errors about the field."""

    field: str = FIELD
    hint: str = HINT
    nulls: int = 0  # entries whose text is null
    first_null: str = ""
    left_out: list[NotText] = dataclasses.field(default_factory=list)  # files of folders

    def documents(self, path: Path) -> Iterator[tuple[str, int]]:
        """Every document of one file, with the number of bytes of the file it stands for."""
        form = form_of(path)
        if form == "text":
            yield whole_text(path), check_ordinary(path).st_size
        elif form == "parquet":
            share = check_ordinary(path).st_size // max(1, parquet_rows(path, self.field, self.hint))
            growth = Growth(path)
            for number, entry in enumerate(self.entries(path), 1):
                growth.add(entry.end - entry.begin, number * share)
                if (text := self.text(entry)) is not None:
                    yield text, share
        else:
            yield from self._of_json(path)

    def _of_json(self, path: Path) -> Iterator[tuple[str, int]]:
        at = 0
        with opened(path) as (content, file):
            entries = line_entries(content, path) if form_of(path) == "lines" else self._values(value_entries(content, path))
            for entry in entries:
                if (text := self.text(entry)) is not None:
                    before, at = at, file.tell()
                    yield text, at - before

    def entries(self, path: Path, sizes: list[int] | None = None, ahead: Ahead | None = None) -> Iterator[Entry]:
        """The entries of a file that holds many. `sizes` are those of `sizes`; `ahead` is that of `entries.py`."""
        if form_of(path) == "parquet":
            yield from parquet_entries(path, self.field, self.hint, sizes or [], ahead)
            return
        with opened(path) as (content, _):
            if form_of(path) == "lines":
                yield from line_entries(content, path, None if is_packed(path) else ahead)
            else:
                yield from self._values(value_entries(content, path))

    def _values(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """Those of a .json file, which may be anything: one that does not begin with a document is not text."""
        try:
            for entry in entries:
                text_of(entry, self.field, self.hint)
                yield entry
                break
        except Damaged:
            raise
        except UpfitError as error:
            raise NotText(str(error)) from error
        yield from entries

    def text(self, entry: Entry) -> str | None:
        """The text of an entry; None, which is counted, where that is null."""
        text = text_of(entry, self.field, self.hint)
        if text is None:
            self.nulls, self.first_null = self.nulls + 1, self.first_null or entry.where
        return text

    def sizes(self, path: Path) -> list[int]:
        """Bytes of text in the parts of a file; a file that is packed is read for it."""
        check_ordinary(path)
        return parquet_sizes(path, self.field, self.hint) if form_of(path) == "parquet" else [unpacked_size(path)]

    def of_folder(self, folder: Path, paths: Iterable[Path]) -> Iterator[tuple[str, int]]:
        """The documents of a folder's files; those that are not text are left out.

        Raises UpfitError when that leaves none.
        """
        empty, before = True, len(self.left_out)
        for path in paths:
            try:
                for document in self.documents(path):
                    empty = False
                    yield document
            except NotText as error:
                self.left_out.append(error)
        if empty and len(self.left_out) > before:
            raise UpfitError(f"{folder} holds no text that can be read: {self.left_out[before]}")

    def account(self, output: Output) -> None:
        """Note what was left out, if anything was."""
        if self.nulls:
            what = "entry has" if self.nulls == 1 else "entries have"
            output.note(f"left out: {self.nulls} {what} no text (null) in {self.field!r}, e.g. {self.first_null}")
        if self.left_out:
            what = "file that is" if len(self.left_out) == 1 else "files that are"
            output.note(f"left out: {len(self.left_out)} {what} not text, e.g. {self.left_out[0]}")
