"""Pieces of context that can be asked about: found in the user's text, invented, or read from FILM's files.

Three kinds are those of VaL probing (arXiv 2404.16811): sentences, functions, records. Pairs are those of the key-value task of
"Lost in the Middle" (arXiv 2307.03172), with shorter keys. Which pieces share a key is looked after here and where a context is
made of them: no question has two answers.
"""

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upfit.bounded import MISSHAPEN, reason
from upfit.errors import UpfitError
from upfit.longcontext.ask import code, invented, prose
from upfit.text import Document
from upfit.text.entries import line_entries, parsed
from upfit.text.packed import opened

KEY_WORDS = 8  # of a sentence, quoted in the question, as in FILM
LEAST_WORDS = 14  # of a sentence: enough beyond the key to tell an answer from an echo
FUNCTION_LINES = range(3, 16)
FUNCTION_CHARACTERS = 700  # so that several stand in a short context


@dataclass(frozen=True)
class Piece:
    """`text` stands in the context; the question quotes `key`; `answer` is what has to be said, `parts` what counts of it.
    The strings `once` may stand nowhere else in the context."""

    text: str
    key: str
    answer: str
    parts: tuple[str, ...]
    once: tuple[str, ...]


def sentence(text: str, key: str) -> Piece:
    return Piece(text, key, text, (text,), (key,))


def function(source: str, name: str, line: str) -> Piece:
    return Piece(source, line, name, (name,), (line, f"def {name}("))


def record(identity: str, label: str, description: str) -> Piece:
    parts = (label, description)
    return Piece(f"[{identity}] {label} | {description}", identity, " | ".join(parts), parts, (f"[{identity}]", *parts))


def pair(key: str, value: str) -> Piece:
    return Piece(f'"{key}": "{value}",', key, f'"{value}"', (value,), (key, value))


def found_sentences(documents: list[Document], rng: np.random.Generator) -> list[Piece]:
    """The sentences of all texts but code, lines joined to paragraphs; each once."""
    unique: dict[str, None] = {}
    for document in documents:
        if document.kind != "code":
            flat = re.sub(r"(?<!\n)\n(?!\n)[ \t]*", " ", document.text)
            unique |= dict.fromkeys(text for text in prose.sentences(flat) if _reads_well(text))
    return [sentence(text, _some_words(text, rng)) for text in unique]


def _reads_well(text: str) -> bool:
    """Whether it is likely a sentence: it begins large, is long enough and made of words."""
    words = text.split()
    plain = sum(word.strip(",;:.!?'\"()").isalpha() for word in words)
    return len(words) >= LEAST_WORDS and text[0].isupper() and plain >= 0.8 * len(words)


def _some_words(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    first = int(rng.integers(len(words) - KEY_WORDS + 1))
    return " ".join(words[first : first + KEY_WORDS])


def found_functions(documents: list[Document], rng: np.random.Generator) -> list[Piece]:
    """Short Python functions of all texts, each name once, with one of their telling lines."""
    functions: dict[str, Piece] = {}
    for document in documents:
        for match in code.FUNCTION.finditer(document.text + "\n"):
            name, source = match.group(2), textwrap.dedent(match.group(0)).rstrip()
            lines = [line.strip() for line in match.group(3).split("\n")]
            telling = [line for line in lines if len(line) >= code.LEAST_LINE and not code.COMMON.match(line)]
            telling = [line for line in telling if name not in line and source.count(line) == 1]
            fits = len(source) <= FUNCTION_CHARACTERS and len(source.split("\n")) in FUNCTION_LINES
            if telling and fits and name not in functions:
                functions[name] = function(source, name, telling[int(rng.integers(len(telling)))])
    return list(functions.values())


def invented_sentence(rng: np.random.Generator) -> Piece:
    town, other_town = invented.new_words(rng, 2)
    who, whom = (str(name) for name in rng.choice(invented.PEOPLE, 2, replace=False))
    here, there = (str(place) for place in rng.choice(invented.PLACES, 2, replace=False))
    thing, colour = (str(rng.choice(words)) for words in (invented.THINGS, invented.COLOURS))
    count = int(rng.integers(3, 1000))
    forms = (
        f"Between the {here} and the {there} of {town}, {who} lost a {colour} {thing} that {whom} had bought in {other_town}.",
        f"For {count} coins {who} gave {whom} of {town} the {colour} {thing}, and kept the {there} near {other_town} for good.",
        f"When {town} was still a village, the {there} beside its {here} held {count} books and a {thing} from {other_town}.",
        f"Nobody in {town} remembers why {who} painted the {thing} {colour} before leaving it in the {here} at {other_town}.",
        f"{who} and {whom} took {count} days to carry the {thing} from {town} to a {here} behind the {there} of {other_town}.",
    )
    text = forms[int(rng.integers(len(forms)))]
    return sentence(text, _some_words(text, rng))


def invented_function(rng: np.random.Generator) -> Piece:
    word, total, argument = (word.lower() for word in invented.new_words(rng, 3))
    verb = rng.choice(("fold", "weigh", "shift", "blend", "trim", "scale", "count", "mirror"))
    noun = rng.choice(("rows", "signal", "ledger", "tiles", "angles", "prices", "marks", "layers"))
    one, two, three = (int(number) for number in rng.integers(11, 10_000, 3))
    name, line = f"{verb}_{noun}_{word}", f"{total} = {argument} * {one} + {two}"
    return function(f"def {name}({argument}):\n    {line}\n    return {total} % {three}", name, line)


def invented_record(rng: np.random.Generator) -> Piece:
    label, place = invented.new_words(rng, 2)
    colour, thing, room = (rng.choice(words) for words in (invented.COLOURS, invented.THINGS, invented.PLACES))
    number = int(rng.integers(1500, 2000))
    return record(f"Q{rng.integers(10_000, 100_000)}", label, f"{colour} {thing} made for the {room} of {place} in {number}")


def invented_pair(rng: np.random.Generator) -> Piece:
    key, value = (rng.bytes(4).hex() for _ in range(2))
    return pair(key, value)


FILM_FILES: dict[str, tuple[str, Callable[[dict[str, Any]], Piece]]] = {
    "val-document": ("document_sentences.jsonl", lambda row: sentence(row["sentence"], row["piece"])),
    "val-code": ("code_functions.jsonl", lambda row: function(row["function_define"], row["function_name"], row["piece"])),
    "val-database": ("database_entities.jsonl", lambda row: record(row["id"], row["label"], row["dcpt"])),
}


def read_film(folder: Path, name: str) -> list[Piece]:
    """The pieces that FILM's repository has for a probe (`VaLProbing/pieces`), each key once.

    Raises UpfitError when the file is not there or not of that shape.
    """
    file, read = FILM_FILES[name]
    path = folder / file
    try:
        with opened(path) as (content, _):
            pieces = [_tidy(read(parsed(entry))) for entry in line_entries(content, path)]
    except UpfitError as error:
        raise UpfitError(f"--probe-pieces: {error}; see docs/evaluate.md") from error
    except MISSHAPEN as error:
        complaint = f"--probe-pieces: {path} does not read as FILM's pieces ({reason(error)}); see docs/evaluate.md"
        raise UpfitError(complaint) from error
    if not pieces:
        raise UpfitError(f"--probe-pieces: {path} is empty; see docs/evaluate.md")
    return list({piece.key: piece for piece in pieces}.values())


def _tidy(piece: Piece) -> Piece:
    """Without white space around what is quoted and compared."""
    parts, once = (tuple(text.strip() for text in texts) for texts in (piece.parts, piece.once))
    return Piece(piece.text.strip("\n"), piece.key.strip(), piece.answer.strip(), parts, once)


def endless(make: Callable[[np.random.Generator], Piece], rng: np.random.Generator) -> Iterator[Piece]:
    """Invented pieces, none sharing a key or an answer with an earlier one."""
    seen: set[str] = set()
    while True:
        piece = make(rng)
        if not seen.intersection((piece.key, *piece.parts)):
            seen.update((piece.key, *piece.parts))
            yield piece
