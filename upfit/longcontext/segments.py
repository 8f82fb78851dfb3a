"""A corpus cut into segments of a hundred-odd tokens, stored as tokens and as text. Contexts are filled with them.

Cut as in IN2's Algorithm 1 (arXiv 2404.16811, camera-ready, appendix D): whole lines until a segment has enough tokens; what is
left at the end of a document goes to its last segment. Unlike there, a very long line is first cut at ends of sentences.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upfit.bounded import RECORD_BYTES, read_json
from upfit.errors import UpfitError
from upfit.output import Meter
from upfit.text.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS, TEXTS, TABLE, ABOUT = "ids.bin", "texts.bin", "table.npy", "about.json"
JOIN = "\n"  # between two segments of a context; each segment's tokens end with it
LONGEST_LINE = 2000  # characters
LEAST_CHARACTERS = 40  # of a document
SENTENCE_END = re.compile(r"(?<=[.!?;。！？])\s+|(?<=\s)\s+")
BATCH = 256  # documents tokenised at once


@dataclass(frozen=True)
class Segments:
    """Segment i is `ids[starts[i]:starts[i + 1]]` (uint32, ending with JOIN), its text is UTF-8 without it."""

    folder: Path

    @cached_property
    def table(self) -> np.ndarray:
        """[segments + 1, 3] int64: where tokens and bytes of a segment begin, and its document."""
        return np.load(self.folder / TABLE)

    @cached_property
    def ids(self) -> np.ndarray:
        return np.asarray(np.memmap(self.folder / IDS, dtype=np.uint32, mode="r"))  # slices of a memmap itself are slow

    @cached_property
    def letters(self) -> np.ndarray:
        return np.asarray(np.memmap(self.folder / TEXTS, dtype=np.uint8, mode="r"))

    @cached_property
    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = read_json(self.folder / ABOUT, RECORD_BYTES)
        return about

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each segment [segments]."""
        return np.diff(self.table[:, 0])

    def __len__(self) -> int:
        return len(self.table) - 1

    @cached_property
    def starts(self) -> list[int]:
        """Where the tokens of each segment begin, and where the last end."""
        return self.table[:, 0].tolist()

    def tokens(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def raw(self, index: int) -> bytes:
        return self.letters[self.table[index, 1] : self.table[index + 1, 1]].tobytes()

    def text(self, index: int) -> str:
        return self.raw(index).decode("utf-8")

    def document(self, index: int) -> int:
        return int(self.table[index, 2])


def lines_of(text: str) -> list[str]:
    """The lines of a document that say something, long ones cut at ends of sentences, or anywhere where there are none."""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if len(line) <= LONGEST_LINE:
            lines.append(line)
            continue
        for part in SENTENCE_END.split(line):
            lines += [part[at : at + LONGEST_LINE] for at in range(0, len(part), LONGEST_LINE)]
    return lines


def cut(lines: list[str], lengths: list[int], least: int) -> list[str]:
    """Segments of at least `least` tokens, of whole lines with `lengths` tokens; a document with fewer is one segment."""
    segments: list[list[str]] = []
    current: list[str] = []
    tokens = 0
    for line, length in zip(lines, lengths, strict=True):
        current.append(line)
        tokens += length
        if tokens >= least:
            segments.append(current)
            current, tokens = [], 0
    if current and segments:
        segments[-1] += current
    elif current:
        segments.append(current)
    texts = ["\n".join(part).strip("\n") for part in segments]
    return [text for text in texts if text.strip()]


def write_segments(
    folder: Path,
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    least: int,
    banned: set[int],
    about: dict[str, Any],
    meter: Meter,
) -> dict[str, Any]:
    """Cut `documents` into the empty `folder`; what was written, as `about.json` tells it.

    Segments that share ten words in a row with `banned` (of `ten_grams`) are left out. Raises UpfitError when nothing is left.
    """
    ends, left_out, index = [(0, 0, 0)], 0, -1
    digest = hashlib.sha256()
    with open(folder / IDS, "wb") as ids_file, open(folder / TEXTS, "wb") as text_file:
        for index, texts in enumerate(_segmented(documents, tokenizer, least)):
            allowed = [text for text in texts if not (banned and ten_grams(text) & banned)]
            left_out += len(texts) - len(allowed)
            for text, ids in zip(allowed, _ids(tokenizer, [text + JOIN for text in allowed]), strict=True):
                raw = text.encode()
                ids_file.write(np.asarray(ids, dtype=np.uint32).tobytes())
                text_file.write(raw)
                digest.update(raw + b"\0")
                ends.append((ends[-1][0] + len(ids), ends[-1][1] + len(raw), index))
            meter.advance(sum(len(text.encode()) for text in texts))
    if len(ends) == 1:
        raise UpfitError("no text is left to cut into segments; give more of it, or fewer texts with --decontaminate")
    table = np.array(ends, dtype=np.int64)
    table[:-1, 2] = table[1:, 2]
    np.save(folder / TABLE, table)
    record = {**about, "segments": len(ends) - 1, "tokens": ends[-1][0], "documents": index + 1}
    record |= {"left_out": left_out, "sha256": digest.hexdigest()}
    (folder / ABOUT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _segmented(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", least: int) -> Iterator[list[str]]:
    """The segments of each document, in order; documents that say nothing have none."""
    for batch in _batches(documents):
        lines = [lines_of(text) if len(text.strip()) >= LEAST_CHARACTERS else [] for text in batch]
        flat = [line + "\n" for paragraph in lines for line in paragraph]
        lengths = iter([len(ids) for ids in _ids(tokenizer, flat)])
        for paragraph in lines:
            yield cut(paragraph, [next(lengths) for _ in paragraph], least)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in documents:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return encode_texts(tokenizer, texts, return_attention_mask=False)["input_ids"]


WORD = re.compile(r"\w+")
GRAM = 10  # words in a row that count as copied


def ten_grams(text: str) -> set[int]:
    """Hashes of every ten words in a row, without case and punctuation (FILM's rule of what an evaluation has in common)."""
    words = [word.lower() for word in WORD.findall(text)]
    return {_hash(" ".join(words[at : at + GRAM])) for at in range(len(words) - GRAM + 1)}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
