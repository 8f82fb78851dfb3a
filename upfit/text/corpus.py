"""Iterates over documents of any amount of text: files, folders and data sets of the hub."""

from collections.abc import Iterator
from pathlib import Path

from upfit.output import Output
from upfit.text.entries import Entry
from upfit.text.files import files_below
from upfit.text.reader import Reader
from upfit.text.tables import hub_rows


def documents(inputs: list[str], field: str, output: Output) -> Iterator[tuple[str, int]]:
    """Every document of every input in order, with the number of input bytes it stands for (0 for the hub).

    `field` names the text in JSON, parquet and hub data sets. What is left out is noted on `output`, at the end.

    Raises UpfitError for what cannot be read, and for a folder that holds no text.
    """
    reader = Reader(field)
    try:
        for name in inputs:
            path = Path(name).expanduser()
            if path.is_dir():
                yield from reader.of_folder(path, files_below(path))
            elif path.exists():
                yield from reader.documents(path)
            else:
                yield from _of_hub(name, reader)
    finally:
        reader.account(output)


def _of_hub(name: str, reader: Reader) -> Iterator[tuple[str, int]]:
    for number, row in enumerate(hub_rows(name), 1):
        text = reader.text(Entry(Path(name), number, 0, 0, row))
        if text is not None:
            yield text, 0
