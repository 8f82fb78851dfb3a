"""Reads files whose entries have several fields: JSON lines, JSON, CSV and parquet."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit.bounded import check_ordinary
from upfit.errors import UpfitError
from upfit.text.entries import cleaned, line_entries, parsed, value_entries
from upfit.text.files import FORMS, files_below, form_of, inner_suffix
from upfit.text.packed import opened
from upfit.text.tables import parquet_records

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = frozenset({*FORMS, *SEPARATORS})
SHOWN = 8  # names of fields in an error


@dataclass(frozen=True)
class Record:
    """One entry: `where` it stands, for errors, and its `fields`."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str | None:
        """The text in the field `name`; None where there is none."""
        value = self.fields.get(name)
        return cleaned(value) if isinstance(value, str) else None

    def shown(self) -> str:
        """The names of the fields, for an error."""
        names = [cleaned(str(name))[:40] for name in self.fields]
        return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def record_files(names: list[str], flag: str) -> list[Path]:
    """The files of `names`, and those in its folders, that hold records; [] where all that is there is text.

    Raises UpfitError when a name is not there, or files of both kinds are.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if not path.exists():
            raise UpfitError(
                f"{flag} {name} is not here; give files of records ({' '.join(sorted(SUFFIXES))}), text, or a folder"
            )
        files += files_below(path) if path.is_dir() else [path]
    records = [file for file in files if inner_suffix(file) in SUFFIXES]
    others = [name for name in names if Path(name).expanduser() in files and Path(name).expanduser() not in records]
    if records and others:
        raise UpfitError(f"{flag} has records ({records[0]}) and text ({others[0]}); give one or the other")
    return records


def read_records(path: Path) -> Iterator[Record]:
    """The entries of one file. Raises UpfitError for damaged files, and entries that have no fields."""
    check_ordinary(path)
    if inner_suffix(path) in SEPARATORS:
        yield from _rows(path)
        return
    if form_of(path) == "parquet":
        for number, row in enumerate(parquet_records(path), 1):
            yield Record(f"{path} row {number}", row)
        return
    with opened(path) as (content, _):
        for entry in (line_entries if form_of(path) == "lines" else value_entries)(content, path):
            value = parsed(entry) if isinstance(entry.value, bytes) else entry.value
            if not isinstance(value, dict):
                raise UpfitError(f"{entry.where} is no JSON object but {type(value).__name__}; give one with named fields")
            yield Record(entry.where, value)


def _rows(path: Path) -> Iterator[Record]:
    with opened(path) as (content, _):
        lines = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(lines, delimiter=SEPARATORS[inner_suffix(path)])
        try:
            for row in reader:
                yield Record(f"{path} line {reader.line_num}", {name: value for name, value in row.items() if name is not None})
        except (csv.Error, UnicodeDecodeError) as error:
            raise UpfitError(
                f"{path} line {reader.line_num + 1} is no row of a table ({error}); mend it or leave it out"
            ) from error
