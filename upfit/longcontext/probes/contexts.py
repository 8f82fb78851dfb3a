"""Contexts of a given length with one question for each of equally many stretches of them, for one or several tokenizers.

A context is asked about at all its depths, so that a model has to read it only once. It ends with one more question, about some
place in it, that is answered: so a model that knows no instructions sees what an answer looks like. Nothing is cut to fit: a
context is made of as many whole pieces or lines as there is room for, and what does not fit is refused. All tokenizers get the
same text.

Legend: T tokens of a context, D depths (stretches, questions).
"""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upfit.errors import UpfitError
from upfit.longcontext.items import generator
from upfit.longcontext.probes import pieces as pools
from upfit.longcontext.probes.families import FAMILIES, Family
from upfit.longcontext.probes.hidden import running_lines
from upfit.longcontext.probes.pieces import Piece
from upfit.longcontext.segments import JOIN
from upfit.longcontext.wording import EXAMPLE, QUESTION, Format, Wording
from upfit.text import Document
from upfit.text.windows import encode

SPARE = 8  # tokens that a model may say beyond the true answer's length
CHARACTERS = 64  # of running text to choose from for each token of a context: a dozen contexts that share nothing
TRIES = 8  # contexts drawn before a text is called too repetitive


@dataclass(frozen=True)
class Question:
    """About what stands at `depth` [0, 1) of the context's characters, in piece or line number `position`."""

    depth: float
    position: int
    key: str
    answer: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Laid:
    """One context with its example in tokens: `ids` [T], and for each of its D questions what is asked and has to be answered.

    Prompt, answer and SPARE tokens together are never more than `length`. `source`: text, invented or pieces.
    """

    name: str
    length: int
    source: str
    tokenizer: Any
    ids: np.ndarray
    questions: tuple[Question, ...]
    example: Question
    asks: tuple[np.ndarray, ...]
    answers: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Supply:
    """Texts that a context can be made of, their tokens [texts] (of the tokenizer that needs most) and the pieces they are."""

    source: str
    texts: list[str]
    tokens: np.ndarray
    pieces: list[Piece]


@dataclass(frozen=True)
class Settings:
    """`depths`: questions a context; `asked`: hidden statements in one question; `folder`: of FILM's pieces."""

    depths: int
    asked: int = 1
    form: Format = "plain"
    folder: Path | None = None
    seed: int = 0


def make_contexts(
    name: str, tokenizers: list[Any], documents: list[Document], lengths: list[int], count: int, settings: Settings
) -> list[list[Laid]]:
    """For each tokenizer the same `count` contexts of each length. The same call gives the same contexts.

    Raises UpfitError when a length does not hold a question for each depth, or the text or the pieces do not suffice.
    """
    wordings = [Wording(tokenizer, settings.form) for tokenizer in tokenizers]
    supply = _supply(name, wordings, documents, max(lengths), settings)
    drawn = [_fitted(name, supply, wordings, length, number, settings) for length in lengths for number in range(count)]
    return [list(column) for column in zip(*drawn, strict=True)]


def _supply(name: str, wordings: list[Wording], documents: list[Document], most: int, settings: Settings) -> Supply:
    """What there is to fill contexts of up to `most` tokens with."""
    family, rng = FAMILIES[name], generator(settings.seed, f"{name} pieces", 0)
    if family.hide is not None:
        lines = running_lines(documents, rng, CHARACTERS * most)
        counted = Supply("text", lines, _counts(wordings, lines), [])
        return _enough(counted, most, f"--probe {name}: the text", "give more of it with --data")
    if settings.folder is not None and name in pools.FILM_FILES:
        read = _of_pieces("pieces", pools.read_film(settings.folder, name), wordings)
        return _enough(read, most, f"--probe-pieces: the file for {name}", "give a smaller --probe-length")
    if family.from_text is not None:
        supply = _of_pieces("text", family.from_text(documents, rng), wordings)
        if supply.tokens.sum() >= most:
            return supply
    assert family.invented is not None
    drawn, source = list[Piece](), pools.endless(family.invented, rng)
    while not drawn or _of_pieces("invented", drawn, wordings).tokens.sum() < 2 * most:  # contexts are to differ
        drawn += [next(source) for _ in range(len(drawn) or 64)]
    return _of_pieces("invented", drawn, wordings)


def _of_pieces(source: str, pieces: list[Piece], wordings: list[Wording]) -> Supply:
    texts = [piece.text for piece in pieces]
    return Supply(source, texts, _counts(wordings, texts), pieces)


def _counts(wordings: list[Wording], texts: list[str]) -> np.ndarray:
    if not texts:
        return np.zeros(0, dtype=np.int64)
    lines = [text + JOIN for text in texts]
    return np.max([[len(ids) for ids, _ in encode(wording.tokenizer, lines)] for wording in wordings], axis=0)


def _enough(supply: Supply, most: int, what: str, advice: str) -> Supply:
    if supply.tokens.sum() < most:
        raise UpfitError(f"{what} has {supply.tokens.sum()} tokens, too few for {most}; {advice}")
    return supply


def _fitted(name: str, supply: Supply, wordings: list[Wording], length: int, number: int, settings: Settings) -> list[Laid]:
    """Context `number` of a length for each tokenizer: drawn again with less room until nothing is too long."""
    room = length - max(len(wording.before) for wording in wordings)
    while room > 0:
        drawn = _drawn(name, supply, room, f"{name} {length}", number, settings)
        if drawn is None:
            break
        laid = [_lay(name, length, supply.source, wording, *drawn) for wording in wordings]
        over = max(_longest(item) for item in laid) - length
        if over <= 0:
            return laid
        room -= over
    raise UpfitError(
        f"--probe {name}: {length} tokens do not hold {settings.depths} questions with one answer each; "
        "give a larger --probe-length or fewer --probe-depths"
    )


def _longest(laid: Laid) -> int:
    return len(laid.ids) + SPARE + max(len(a) + len(b) for a, b in zip(laid.asks, laid.answers, strict=True))


Drawn = tuple[str, tuple[Question, ...], Question]


def _drawn(name: str, supply: Supply, room: int, purpose: str, number: int, settings: Settings) -> Drawn | None:
    """A context of about `room` tokens, its questions and the example; None when none of several has unambiguous ones."""
    draw = _of_statements if FAMILIES[name].hide is not None else _of_stretches
    for attempt in range(TRIES):
        drawn = draw(FAMILIES[name], supply, room, generator(settings.seed, f"{purpose} {attempt}", number), settings)
        if drawn is not None:
            return drawn
    return None


def _of_stretches(family: Family, supply: Supply, room: int, rng: np.random.Generator, settings: Settings) -> Drawn | None:
    """Pieces in a random order; of each stretch one, at random, whose key and answer stand in the context once, and of all of
    them one more."""
    used = _filling(supply, rng.permutation(len(supply.texts)), room)
    texts = [supply.texts[index] for index in used]
    text, starts = JOIN.join(texts), _starts(texts)
    questions: list[Question] = []
    for low, high in [*_stretches(len(used), settings.depths), (0, len(used))]:
        taken = {question.position for question in questions}
        for index in map(int, low + rng.permutation(high - low)):
            piece = supply.pieces[used[index]]
            if index not in taken and all(text.count(key) == 1 for key in piece.once):
                questions.append(Question(starts[index] / len(text), index, piece.key, piece.answer, piece.parts))
                break
        else:
            return None
    return text, tuple(questions[:-1]), questions[-1]


def _of_statements(family: Family, supply: Supply, room: int, rng: np.random.Generator, settings: Settings) -> Drawn | None:
    """Lines of the text from a random one on, in each stretch of them one hidden fact, its statements in order, and one more
    fact anywhere."""
    assert family.hide is not None
    facts = family.hide(rng, settings.depths + 1, settings.asked)
    start = int(rng.integers(len(supply.texts)))
    used = _filling(supply, np.roll(np.arange(len(supply.texts)), -start), room)
    lines = [supply.texts[index] for index in used]
    if len(lines) < settings.depths:
        return None
    inserts = []
    for fact, (low, high) in zip(facts, [*_stretches(len(lines), settings.depths), (0, len(lines))], strict=True):
        line_numbers = sorted(int(position) for position in rng.integers(low, high, len(fact.statements)))
        inserts += list(zip(line_numbers, fact.statements, strict=True))
    texts = list(lines)
    for position, statement in reversed(sorted(inserts, key=lambda insert: insert[0])):  # those in front stay where they are
        texts.insert(position, statement)
    text, starts = JOIN.join(texts), _starts(texts)
    statements = "\n".join(statement for fact in facts for statement in fact.statements)
    if any(text.count(key) != statements.count(key) for fact in facts for key in fact.once):
        return None
    positions = [texts.index(fact.statements[0]) for fact in facts]
    *questions, example = [
        Question(starts[position] / len(text), position, fact.key, fact.answer, fact.parts)
        for fact, position in zip(facts, positions, strict=True)
    ]
    return text, tuple(questions), example


def _filling(supply: Supply, order: np.ndarray, room: int) -> np.ndarray:
    """The first texts, in an order, that `room` tokens hold."""
    return order[: int(np.searchsorted(np.cumsum(supply.tokens[order]), room, side="right"))]


def _starts(texts: list[str]) -> list[int]:
    """The character at which each of the joined texts begins."""
    return [0, *np.cumsum([len(text) + len(JOIN) for text in texts])[:-1].tolist()]


def _stretches(count: int, depths: int) -> list[tuple[int, int]]:
    """`range(count)` in equal parts."""
    return [(count * depth // depths, count * (depth + 1) // depths) for depth in range(depths)]


def _lay(
    name: str, length: int, source: str, wording: Wording, text: str, questions: tuple[Question, ...], example: Question
) -> Laid:
    """In the tokens of one model. Raises UpfitError when its tokenizer joins the answer with what stands before it."""
    family = FAMILIES[name]
    head, _, tail = wording.after.partition(QUESTION)
    shown = f"{family.lead.format(key=example.key)} {example.answer}"
    read = text + JOIN + head + EXAMPLE.format(question=family.question.format(key=example.key), answer=shown)
    befores = [family.question.format(key=hidden.key) + tail + family.lead.format(key=hidden.key) for hidden in questions]
    whole = [f"{before} {question.answer}" for before, question in zip(befores, questions, strict=True)]
    asks, answers = [], []
    for before, (ids, ends) in zip(befores, encode(wording.tokenizer, whole), strict=True):
        split = bisect_right(ends, len(before))
        if ends[split - 1] != len(before):
            raise UpfitError(f"--probe {name} needs a tokenizer that begins a token at a space")
        asks.append(np.array(ids[:split], dtype=np.int64))
        answers.append(np.array(ids[split:], dtype=np.int64))
    ((context, _),) = encode(wording.tokenizer, [read])
    fed = np.array([*wording.before.tolist(), *context], dtype=np.int64)
    return Laid(name, length, source, wording.tokenizer, fed, questions, example, tuple(asks), tuple(answers))
