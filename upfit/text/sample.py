"""Documents to measure or calibrate on: all of the text where it is little, and else parts spread evenly over all of it."""

from dataclasses import dataclass
from pathlib import Path

from upfit.errors import UpfitError
from upfit.output import Output
from upfit.text.documents import Document
from upfit.text.files import FIELD, NotText, check_field, find_files, form_of
from upfit.text.plain import BLOCKS, LARGEST, LEAST_BLOCK, beginning, read_blocks
from upfit.text.reader import Reader

MOST_FILES = 256  # of a folder, spread over it, are opened
PIECE_SHARE = 4  # a document is read whole up to a quarter of the budget


@dataclass(frozen=True)
class TextFile:
    path: Path
    sizes: list[int]  # bytes of text, in parts
    in_folder: bool  # found there, not named

    @property
    def size(self) -> int:
        return sum(self.sizes)


def file_documents(
    names: list[str], budget: int, flag: str = "--data", output: Output | None = None, field: str = FIELD
) -> list[Document]:
    """The documents in the files and folders `names`, which hold text in any form that `docs/prepare.md` lists.

    `field` has the text in JSON and parquet. `flag` is named in errors; what is left out is noted on `output`. Of text above
    `budget` bytes only parts are read, at most so many bytes, spread evenly over the files and inside each. There, of a
    document longer than a quarter of `budget` the beginning is read, in proportion to its length: the share of long documents
    is what it is in the text.

    Raises UpfitError when a name is not there, or holds no text, for damaged files, and for JSON without the field.
    """
    reader = Reader(field)
    files = _measured(names, flag, reader)
    quota = Quota(budget, sum(file.size for file in files))
    documents: list[Document] = []
    for file in files:
        try:
            documents += [Document(text, str(file.path)) for text in _texts(file, quota, reader) if text.strip()]
        except NotText as error:
            if not file.in_folder:
                raise
            reader.left_out.append(error)
    if not documents and reader.left_out:
        raise UpfitError(f"{flag} {', '.join(names)} holds no text that can be read: {reader.left_out[0]}")
    if output is not None:
        reader.account(output)
    return documents


def _measured(names: list[str], flag: str, reader: Reader) -> list[TextFile]:
    paths = [(path, not Path(name).expanduser().is_file()) for name in names for path in find_files(name, flag)]
    check_field([path for path, _ in paths], reader.field)
    return [TextFile(path, reader.sizes(path), in_folder) for path, in_folder in paths[:: -(-len(paths) // MOST_FILES)]]


def _texts(file: TextFile, quota: "Quota", reader: Reader) -> list[str]:
    """What is to be read of the documents of one file."""
    quota.enter(file.size)
    if form_of(file.path) == "text":
        share = min(quota.share, LARGEST)
        quota.spent += share
        return read_blocks(file.path, file.size, share)
    if quota.is_enough:
        return [text for text, _ in reader.documents(file.path)]
    texts: list[str] = []
    for entry in reader.entries(file.path, file.sizes, quota.ahead):
        nbytes = quota.take(entry.begin, entry.end)
        text = reader.text(entry) if nbytes else None
        if text is not None:
            texts.append(beginning(text, nbytes))
    return texts


class Quota:
    """Spends `budget` bytes evenly along `total` bytes of text, in blocks, on whole documents or beginnings of long ones.

    Think of every document as pieces of up to a quarter of the budget. A piece is read where the text before it has been given
    less than its due, so that none is favoured for its length: what was spent too much on one is withheld from those behind
    it. Of a document of which n pieces are read, that is the first n.
    """

    def __init__(self, budget: int, total: int) -> None:
        self.budget, self.total = budget, total
        self.piece = max(budget // PIECE_SHARE, 1)
        self.spent = self.start = self.size = 0
        self.blocks = 1

    @property
    def is_enough(self) -> bool:
        return self.total <= self.budget

    @property
    def share(self) -> int:
        """Bytes of the file's text that are its own."""
        return self.size if self.is_enough else self.size * self.budget // self.total

    def enter(self, size: int) -> None:
        """Go on to a file with `size` bytes of text."""
        self.start, self.size = self.start + self.size, size
        self.blocks = max(1, min(BLOCKS, self.share // LEAST_BLOCK))

    def due(self, block: int) -> int:
        """What is to have been spent at the end of a block of the file."""
        return self.budget * (self.start * self.blocks + self.size * (block + 1)) // (self.total * self.blocks)

    def take(self, begin: int, end: int) -> int:
        """How many bytes of the document between these places of the file are to be read, from its beginning."""
        taken = 0
        for offset in range(begin, end, self.piece):
            block = min(offset * self.blocks // max(1, self.size), self.blocks - 1)
            if self.spent < self.due(block):
                part = min(self.piece, end - offset, self.budget - self.spent)
                self.spent, taken = self.spent + part, taken + part
        return taken

    def ahead(self, offset: int) -> int | None:
        """The next offset of the file, from `offset` on, where something is due; None when there is none."""
        first = offset * self.blocks // max(1, self.size)
        for block in range(first, self.blocks):
            if self.spent < self.due(block):
                return max(offset, -(-block * self.size // self.blocks))
        return None
