"""Questions by a language model: what it is asked, how its answer is read, and what of it is kept.

After IN2 (arXiv 2404.16811, appendix D): one question about one segment, or, of a share of the items, one that needs several
consecutive segments. Nothing there checked the answers; here rules do, for more than a third of such questions are no good
otherwise (LongMIT, arXiv 2409.01893).
"""

import re
from dataclasses import dataclass

import numpy as np

from upfit.longcontext.items import Item, generator
from upfit.longcontext.segments import Segments

SEVERAL = range(2, 5)  # segments of a question that needs more than one
FORM = "\n\nWrite two lines:\nQuestion: ...\nAnswer: ..."
RULES = (
    "The question must name what it is about so clearly that somebody with the whole text can find the place; it must not "
    "mention a text, a piece or a passage. Answer in one to three sentences of your own, with nothing that is not said there."
) + FORM
ONE = "Here is a piece of a longer text.\n\n{text}\n\nWrite one question that this piece answers, and its answer. " + RULES
MORE = (
    "Here are pieces of a longer text, in order.\n\n{text}\n\nWrite one question that can only be answered by putting together "
    "what at least two of these pieces say, and its answer. "
) + RULES
ANSWERED = re.compile(r"\W*question\W*:\W*(?P<question>.+?)\s*\n\W*answer\W*:\s*(?P<answer>.+)", re.IGNORECASE | re.DOTALL)
BANNED = re.compile(
    r"\b(the|this|that|given|provided|above|following) (text|passage|context|piece|segment|excerpt|snippet)s?\b", re.I
)
EVASIVE = re.compile(r"\b(not (mentioned|specified|stated|provided)|unknown|cannot be (determined|answered))\b", re.I)
ANCHOR = re.compile(r"\b(?:\w*\d\w*|\w+_\w+|[a-z]+[A-Z]\w*|[A-Z]\w{2,}|\w{8,})\b")
WORD = re.compile(r"\w+")
QUESTION_WORDS, ANSWER_WORDS = range(4, 61), range(1, 121)
GROUNDED = 0.4  # of an answer's longer words must stand in its pieces


@dataclass(frozen=True)
class Request:
    """What a model is asked for item `index`, about the segments `pieces`."""

    index: int
    prompt: str
    pieces: tuple[int, ...]


def request(segments: Segments, seed: int, index: int, several_share: float) -> Request:
    """The request of item `index`: a pure function of the corpus and the settings."""
    rng = generator(seed, "model", index)
    segment = int(rng.integers(len(segments)))
    pieces = [segment]
    if rng.random() < several_share:
        wanted = int(rng.integers(SEVERAL.start, SEVERAL.stop))
        run = range(segment, min(segment + wanted, len(segments)))
        pieces = [near for near in run if segments.document(near) == segments.document(segment)]
    texts = [segments.text(piece) for piece in pieces]
    if len(pieces) == 1:
        return Request(index, ONE.format(text=texts[0]), (segment,))
    numbered = "\n\n".join(f"Piece {number}:\n{text}" for number, text in enumerate(texts, 1))
    return Request(index, MORE.format(text=numbered), tuple(pieces))


def read(asked: Request, answer: str, segments: Segments, name: str) -> Item | str:
    """The item that a model's answer makes, or why it makes none. `name`: of the model, kept with the item."""
    match = ANSWERED.search(answer)
    if not match:
        return "not in two lines"
    question = " ".join(match["question"].strip("*_ ").split())
    reply = " ".join(match["answer"].strip("*_ ").split())
    reason = refused(question, reply, [segments.text(piece) for piece in asked.pieces])
    if reason:
        return reason
    several = len(asked.pieces) > 1
    pattern = "question on several texts" if several else "question on text"
    family = "several" if several else "single"
    return Item(asked.index, family, pattern, question, reply, asked.pieces, (), generator=name)


def refused(question: str, answer: str, pieces: list[str]) -> str | None:
    """Why a question and its answer are not kept; None when they are."""
    if len(question.split()) not in QUESTION_WORDS or len(answer.split()) not in ANSWER_WORDS:
        return "too short or too long"
    if not question.endswith("?"):
        return "no question"
    if BANNED.search(question) or BANNED.search(answer):
        return "speaks of the text"
    if EVASIVE.search(answer) or answer.lower() == question.lower():
        return "no answer"
    text = " ".join(pieces).lower()
    if not any(anchor.lower() in text for anchor in ANCHOR.findall(question)[1:] or ANCHOR.findall(question)):
        return "names nothing"
    words = {word.lower() for word in WORD.findall(answer) if len(word) > 3}
    exact = [anchor.lower() for anchor in re.findall(r"\b\w*\d\w*\b", answer)]
    if any(number not in text for number in exact) or (words and np.mean([word in text for word in words]) < GROUNDED):
        return "not from the pieces"
    if len(pieces) > 1 and sum(any(word in piece.lower() for word in words) for piece in pieces) < 2:
        return "needs one piece only"
    return None
