"""Turns calibration text into windows of token ids and holds some of them back."""

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfit.architecture.meta_model import quiet_transformers, vocabulary
from upfit.calibration.observe import Opaque
from upfit.checkpoint.reader import Checkpoint, most_positions
from upfit.errors import UpfitError
from upfit.examples.model_inputs import ModelInputs
from upfit.examples.pairs import is_pair_field
from upfit.options import parse_count
from upfit.output import Output
from upfit.text import Document, file_documents, library_documents
from upfit.text.files import FIELD, check_field, has_metadata, named_files
from upfit.text.plain import pieces
from upfit.text.tokenizer import identity, no_panic
from upfit.text.windows import encode, prefix_ids

TOKENS = 64_000  # docs/convert.md: the fit takes about as long as it has tokens
LENGTH = 2048  # of the longer windows, unless the user serves another length
SHORT = 512  # half of the tokens stand in windows of this length, whatever the length to be served
HELD_SHARE = 8  # one window of so many is held back
BATCH_TOKENS = 4096  # a layer's attention maps of one batch fit into memory
SEED = 20240229  # any number, always the same
BYTES_PER_TOKEN = 8  # read at most so much text for each token wanted
FLAG = "--calibration"
USERS = "text"  # the kind of documents of files; those of Python are drawn as figures were measured with


@dataclass(frozen=True)
class Sample:
    """Windows of token ids by their length, [n, length] int64 each, the first `held[length]` of them held back."""

    windows: dict[int, Tensor]
    held: dict[int, int]
    text: dict[str, Any]  # where it came from, for recipe.json
    tokenizer: dict[str, Any]  # what made ids of it, as `upfit.text.tokenizer.identity` tells it

    @property
    def tokens(self) -> int:
        return sum(rows.numel() for rows in self.windows.values())

    def record(self) -> dict[str, Any]:
        """What was shown, for recipe.json."""
        return {"tokens": self.tokens, "windows": {length: len(rows) for length, rows in self.windows.items()}, **self.text}

    def identity(self) -> dict[str, Any]:
        """All of it that the bytes of a fit depend on."""
        content = b"".join(rows.numpy().tobytes() for rows in self.windows.values())
        shapes = [[len(rows), length, self.held[length]] for length, rows in self.windows.items()]
        return {"windows": shapes, "text": hashlib.sha256(content).hexdigest()}

    def batches(self) -> tuple[list[ModelInputs], list[bool]]:
        """Windows of one length and one purpose, together in pieces of at most BATCH_TOKENS; and which pieces are held back."""
        pieces, purposes = [], []
        for length, rows in sorted(self.windows.items()):
            size = max(1, BATCH_TOKENS // length)
            for part, back in ((rows[: self.held[length]], True), (rows[self.held[length] :], False)):
                for at in range(0, len(part), size):
                    pieces.append(ModelInputs({"input_ids": part[at : at + size]}))
                    purposes.append(back)
        return pieces, purposes


def read_documents(texts: list[str] | None, tokens: int, output: Output | None = None, field: str = FIELD) -> list[Document]:
    """The files `texts`, or without any the standard library of the running Python. What is left out is noted on `output`."""
    if texts:
        return file_documents(texts, 2 * tokens * BYTES_PER_TOKEN, FLAG, output, field)
    return library_documents()


def check_texts(texts: list[str] | None, field: str = FIELD) -> None:
    """A cheap look before a model is read. Raises UpfitError when one of the files and folders `texts` is not there, or when
    none can have the `field`."""
    if texts and any(map(is_statistics, texts)):
        check_field([Path(name) for name in texts], field)
    elif texts and not is_pair_field(field) and not any(map(has_metadata, texts)):
        named_files(texts, FLAG, field)


def make_sample(documents: list[Document], tokenizer: Any, tokens: int, length: int, text: dict[str, Any]) -> Sample:
    """About `tokens` tokens in windows of `length` and, where that is longer, as many in windows of SHORT.

    Documents are put one after the other in a random but fixed order, kinds in turn, and cut into windows; each window begins
    as the tokenizer begins a text. Raises UpfitError when there is too little text for two windows of each length.
    """
    prefix = prefix_ids(tokenizer)
    lengths = sorted({length, min(length, SHORT)}, reverse=True)
    wanted = {size: max(2, tokens // len(lengths) // size) for size in lengths}
    needed = sum(count * size for size, count in wanted.items())
    size = max((needed + length) // 16, 2 * SHORT)
    if all(document.kind == USERS for document in documents):
        size = max(size, length)
        documents = _in_pieces(documents, tokenizer, size)
    ids = _running_ids(documents, tokenizer, needed + length, size)
    have = len(ids)
    if have < needed:
        scale = have / needed
        wanted = {size: max(2, int(count * scale)) for size, count in wanted.items()}
        if sum(count * size for size, count in wanted.items()) > have:
            raise UpfitError(
                f"the calibration text has {have} tokens, too few for windows of {length}; give more text, or a smaller "
                "--calibration-length"
            )
    blocks = [size for size, count in wanted.items() for _ in range(count)]
    random.Random(SEED).shuffle(blocks)
    windows: dict[int, list[list[int]]] = {size: [] for size in lengths}
    at = 0
    for size in blocks:
        body = size - len(prefix)
        windows[size].append(prefix + ids[at : at + body])
        at += body
    tensors = {size: torch.tensor(rows, dtype=torch.int64) for size, rows in windows.items()}
    held = {size: max(1, len(rows) // HELD_SHARE) for size, rows in tensors.items()}
    digest = hashlib.sha256(b"".join(rows.numpy().tobytes() for _, rows in sorted(tensors.items()))).hexdigest()
    return Sample(tensors, held, {**text, "sha256": digest}, identity(tokenizer))


def _in_pieces(documents: list[Document], tokenizer: Any, size: int) -> list[Document]:
    """The documents in pieces of about `size` tokens at most: a long one is drawn as often as its length makes up for."""
    text = "\n".join(document.text[:2000] for document in documents[:: -(-len(documents) // 32) or 1])
    nbytes = max(1, len(text.encode("utf-8")) * size // max(1, len(encode(tokenizer, [text])[0][0])))
    return [replace(document, text=piece) for document in documents for piece in pieces(document.text, nbytes)]


def _running_ids(documents: list[Document], tokenizer: Any, enough: int, size: int) -> list[int]:
    """About `enough` tokens of the documents, pieces of `size` one after the other (fewer where there are no more).

    Kinds take turns; documents come in random but fixed order, at first one piece of each, then what is left of them.
    """
    draw = random.Random(SEED)
    kinds = sorted({document.kind for document in documents})
    queues: dict[str, list[Document | list[int]]] = {kind: [d for d in documents if d.kind == kind] for kind in kinds}
    for queue in queues.values():
        draw.shuffle(queue)
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    counts = dict.fromkeys(kinds, 0)
    while any(queues.values()) and len(ids) < enough:
        kind = min((kind for kind in kinds if queues[kind]), key=lambda kind: counts[kind])
        piece = queues[kind].pop(0)
        if isinstance(piece, Document):
            whole = encode(tokenizer, [piece.text])[0][0]
            pieces: list[Document | list[int]] = [whole[at : at + size] for at in range(0, len(whole), size)] or [[]]
            chosen = pieces.pop(draw.randrange(len(pieces)))
            assert isinstance(chosen, list)
            queues[kind] += pieces
            piece = chosen
        counts[kind] += len(piece)
        ids += piece + separator
    return ids


def fast_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer. Raises Opaque when the folder has none that can be loaded here, or only a slow one."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), no_panic(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if not tokenizer.is_fast:
                raise ValueError("it is not a fast one")
    except UpfitError:
        raise
    except Exception as error:  # its parsers raise whatever they like on a broken file
        raise Opaque("it has no fast tokenizer that can be loaded here") from error
    return tokenizer


def text_sample(
    folder: Path,
    checkpoint: Checkpoint,
    texts: list[str] | None,
    tokens: str | None,
    length: int | None,
    output: Output | None = None,
    field: str = FIELD,
) -> Sample:
    """Windows of calibration text for this model. `field` has the text in JSON and parquet; what is left out is noted on
    `output`.

    Raises UpfitError for text or sizes that cannot be used, Opaque when the model's folder has no tokenizer of its own.
    """
    count = parse_count(tokens or str(TOKENS), "--calibration-tokens")
    tokenizer = fast_tokenizer(folder)
    longest = most_positions(checkpoint.config)
    if length is not None and length < 8:
        raise UpfitError(f"--calibration-length got {length}; give at least 8 tokens")
    if length is not None and longest is not None and length > longest:
        raise UpfitError(f"--calibration-length {length} is above the model's {longest} positions; give at most {longest}")
    length = length or min(LENGTH, longest or LENGTH)
    text = {"files": texts or "the standard library of Python", "length": length} | ({} if field == FIELD else {"field": field})
    sample = make_sample(read_documents(texts, count, output, field), tokenizer, count, length, text)
    known = vocabulary(checkpoint.config)
    if known is not None and max(int(rows.max()) for rows in sample.windows.values()) >= known:
        raise Opaque(f"its tokenizer has more than the model's {known} ids, so it belongs to another model")
    return sample


def is_statistics(name: str) -> bool:
    return name.endswith(".safetensors")
