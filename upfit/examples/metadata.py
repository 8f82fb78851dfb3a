"""Folders whose `metadata.jsonl` (or .csv) tells the `file_name` and the text of each file, as `datasets` lays out an
AudioFolder or an ImageFolder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from upfit.errors import UpfitError
from upfit.examples.choose import draw
from upfit.examples.records import Record, read_records
from upfit.output import Output
from upfit.text.files import FIELD, METADATA

FILE_NAME = "file_name"
LANGUAGE, DOCUMENT = "language", "document"  # fields that a file may have


@dataclass(frozen=True)
class Described:
    """A file and the text that belongs to it."""

    path: Path
    text: str
    document: str
    language: str | None


@dataclass(frozen=True)
class Layout:
    """What the files of a folder are, in errors: `file` ("recording"), `text` ("transcript"), what the model does with them
    ("hears"), what is `wanted`; and the names of the field of the text, likely ones first."""

    file: str
    text: str
    does: str
    wanted: str
    fields: tuple[str, ...]


def read_described(names: list[str], flag: str, field: str, count: int, layout: Layout, output: Output) -> list[Described]:
    """At most `count` files of the folders `names`, spread over all of them; those without a word are left out, which is noted
    on `output`.

    Raises UpfitError where there is no folder, no metadata, or one that does not tell a file and its text.
    """
    silent = list[Path]()

    def spoken() -> Iterator[Described]:
        for described in (described for name in names for described in _of_folder(name, flag, field, layout)):
            if described.text:
                yield described
            else:
                silent.append(described.path)

    chosen, _ = draw(spoken(), count)
    if silent:
        output.note(f"left out: {len(silent)} {layout.file}s without a word in their {layout.text}s, e.g. {silent[0]}")
    if not chosen:
        raise UpfitError(f"{flag} {', '.join(names)}: no {layout.file} has a {layout.text}; {layout.wanted}")
    return chosen


def _of_folder(name: str, flag: str, field: str, layout: Layout) -> Iterator[Described]:
    folder = Path(name).expanduser()
    if not folder.exists():
        raise UpfitError(f"{flag} {name} is not here; {layout.wanted}")
    if not folder.is_dir():
        raise UpfitError(f"{flag} {name} is a file, and this model {layout.does}; {layout.wanted}")
    metadata = next((folder / file for file in METADATA if (folder / file).is_file()), None)
    if metadata is None:
        raise UpfitError(f"{flag} {name} has no {METADATA[0]}; {layout.wanted}")
    empty = True
    for record in read_records(metadata):
        empty = False
        yield _described(record, folder, field, layout)
    if empty:
        raise UpfitError(f"{metadata} tells of no {layout.file}; {layout.wanted}")


def _described(record: Record, folder: Path, field: str, layout: Layout) -> Described:
    file = record.text(FILE_NAME)
    if not file:
        raise UpfitError(f"{record.where} has no {FILE_NAME} (found: {record.shown()}); {layout.wanted}")
    names = layout.fields if field == FIELD else (field,)
    text = next((text for text in map(record.text, names) if text is not None), None)
    if text is None:
        what = f"no {' or '.join(names[:2])}" if field == FIELD else f"no text in {field!r}"
        raise UpfitError(f"{record.where} has {what} (found: {record.shown()}); name the {layout.text}'s field with --field")
    path = folder / file
    if Path(file).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise UpfitError(f"{record.where} names {file!r}, which is outside its folder; move the {layout.file} there")
    if not path.is_file():
        raise UpfitError(f"{record.where} names {file!r}, which is not in {folder}; put it there, or leave out the line")
    return Described(path, text.strip(), record.text(DOCUMENT) or str(path), record.text(LANGUAGE))
