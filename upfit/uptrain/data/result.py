"""What `upfit prepare` answers."""

from dataclasses import dataclass

from upfit.output import Output, human_count
from upfit.results import Part, Result, beside


@dataclass(frozen=True)
class TokenizerIdentity(Part):
    """What must agree between data and model.

    name: folder or hub id that was given
    sha256: of the vocabulary and of how a probe text is cut
    vocab_size: number of tokens it knows
    eos: id of the token at the end of a document
    bos: id of the token that it puts before a text by itself, if any
    """

    name: str
    sha256: str
    vocab_size: int
    eos: int | None
    bos: int | None


@dataclass(frozen=True)
class ShardFile(Part):
    """A file of the folder.

    bytes: its size, bytes
    sha256: of all of it
    crc32: of each block, eight hexadecimal digits each
    """

    bytes: int
    sha256: str
    crc32: str


@dataclass(frozen=True, repr=False)
class Preparation(Result):
    """The manifest of the token shards that were written.

    format: version of the format
    tokenizer: the tokenizer that was used
    inputs: files, folders or hub data sets that were read
    field: field of JSON and parquet that held the text
    tokens: number of tokens
    documents: number of documents
    largest_id: the largest id of a token
    dtype: type of the ids in the files
    block_bytes: size of the blocks with a checksum, bytes
    files: the files, by name
    out: the folder that was written (not in the record)
    """

    format: int
    tokenizer: TokenizerIdentity
    inputs: list[str]
    field: str
    tokens: int
    documents: int
    largest_id: int
    dtype: str
    block_bytes: int
    files: dict[str, ShardFile]
    out: str = beside()

    def show(self, output: Output) -> None:
        output.line(f"Wrote {self.out}: {human_count(self.tokens)} tokens of {self.documents} documents")
