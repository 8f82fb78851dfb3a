"""Windows of token ids, cut from documents: what a loss is measured on.

Every window is fed as `[prefix] + piece`, where the prefix is what the tokenizer itself puts before a text (mostly one BOS,
often nothing). Without a prefix the first token of the piece is context only. Both ways all fed tokens but the first are
scored, and no window sees another one.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from upfit.errors import UpfitError
from upfit.text import Document
from upfit.text.tokenizer import encode_texts

MIN_TOKENS = 32  # a document that gives less than this is left out: its loss would be mostly that of the first words
SEED = 20240229
TOGETHER = 64  # documents tokenised in one call: bounds the memory of their encodings


@dataclass(frozen=True)
class Window:
    """`ids` [tokens] int64 is fed, `ids[1:]` is scored; the scored tokens stand for `scored_bytes` bytes of UTF-8.

    `text` is the whole piece, for a second tokenizer; `start` its first character in document number `document`.
    """

    ids: np.ndarray
    scored_bytes: int
    text: str
    document: int
    start: int
    kind: str


def prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: [] or, say, [bos]."""
    plain = encode_texts(tokenizer, ["a b"])["input_ids"][0]
    whole = encode_texts(tokenizer, ["a b"], add_special_tokens=True)["input_ids"][0]
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def encode(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """For each text its ids and, for each id, the character at which it ends. `tokenizer` must be a fast one."""
    encoded = encode_texts(tokenizer, texts, return_offsets_mapping=True)
    ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
    return list(zip(encoded["input_ids"], ends, strict=True))


def cut(ids: list[int], ends: list[int], document: Document, number: int, length: int, prefix: list[int]) -> list[Window]:
    """The windows of one tokenised document: full ones side by side, or a single short one when it is not long enough."""
    size = length - len(prefix)
    pieces = [(at, at + size) for at in range(0, len(ids) - size + 1, size)]
    if not pieces and len(prefix) + len(ids) >= min(MIN_TOKENS, length):
        pieces = [(0, len(ids))]
    starts = [0, *ends]  # a token starts where the one before ends: no byte is lost or counted twice
    windows = []
    for first, last in pieces:
        text = document.text[starts[first] : starts[last]]
        scored = document.text[starts[first + (not prefix)] : starts[last]]
        fed = np.array(prefix + ids[first:last], dtype=np.int64)
        windows.append(Window(fed, len(scored.encode("utf-8")), text, number, starts[first], document.kind))
    return windows


def make_windows(documents: list[Document], tokenizer: Any, length: int, count: int) -> list[Window]:
    """At most `count` windows of `length` tokens, spread over all the documents; the same call gives the same windows.

    Raises UpfitError when no document is long enough.
    """
    prefix = prefix_ids(tokenizer)
    windows: list[Window] = []
    for at in range(0, len(documents), TOGETHER):
        together = documents[at : at + TOGETHER]
        for offset, (ids, ends) in enumerate(encode(tokenizer, [document.text for document in together])):
            windows += cut(ids, ends, together[offset], at + offset, length, prefix)
    if not windows:
        raise UpfitError(f"the text is too short: no document has {min(MIN_TOKENS, length)} tokens; give more with --data")
    kinds = sorted({window.kind for window in windows})
    chosen: list[Window] = []
    for index, kind in enumerate(kinds):
        alike = [window for window in windows if window.kind == kind]
        share = count * (index + 1) // len(kinds) - count * index // len(kinds)
        chosen += [alike[i] for i in spread(len(alike), share, SEED)]
    return chosen


def spread(size: int, count: int, seed: int) -> list[int]:
    """`count` of `range(size)`, ascending: one at random from each of `count` equal stretches (all when there are fewer)."""
    if count >= size or count == 0:
        return list(range(min(size, count)))
    draw = random.Random(seed)
    edges = [size * i // count for i in range(count + 1)]
    return [draw.randrange(low, high) for low, high in zip(edges, edges[1:], strict=False)]


def same_tokens(windows: list[Window], first: Any, second: Any) -> bool:
    """Whether two tokenizers turn the text of these windows into the same ids."""
    texts = [window.text for window in windows]
    return prefix_ids(first) == prefix_ids(second) and [e[0] for e in encode(first, texts)] == [
        e[0] for e in encode(second, texts)
    ]


def retokenised(windows: list[Window], tokenizer: Any) -> list[Window]:
    """The same texts as windows of another tokenizer. Lengths in tokens differ; the scored bytes differ by the first token.

    Raises UpfitError when a text becomes too short to score.
    """
    prefix = prefix_ids(tokenizer)
    result = []
    for window, (ids, ends) in zip(windows, encode(tokenizer, [window.text for window in windows]), strict=True):
        if len(prefix) + len(ids) < 2:
            raise UpfitError("a window is a single token for the tokenizer of --against; give a larger --length")
        document = Document(window.text, "", window.kind)
        result += cut(ids, ends, document, window.document, len(prefix) + len(ids), prefix)[:1]
    return result


def digest(windows: list[Window]) -> str:
    """SHA-256 of the token ids (int64, little endian, each window preceded by its length): two runs measured the same text."""
    hasher = hashlib.sha256()
    for window in windows:
        hasher.update(np.array([len(window.ids), *window.ids], dtype="<i8").tobytes())
    return hasher.hexdigest()
