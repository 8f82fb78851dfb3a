"""`--probe counting|flipflop|selective-copy`: how well does a language model do the CoPE paper's tasks, written as text?

The symbols of `upfit/evaluate/synthetic` are written with spaces between and read with the model's own tokenizer. The model
sees the true text up to each answer (teacher forcing). An answer is right when each of its tokens is the model's first choice
among all tokens; it costs the sum of their losses. Nothing explains the task: a model knows it from training or from the text
itself. Items are as large as the text may be long; models that are compared get the same ones.

An answer ends with its last token. Where a tokenizer writes 10 as 1 and 0, what a model would put after an answer of 1 is not
looked at.

Legend: T tokens of one text, A tokens of its answers.
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from upfit.errors import UpfitError
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.probes.summaries import Split, SyntheticTask
from upfit.evaluate.synthetic import counting, flipflop, selective_copy
from upfit.evaluate.synthetic.items import Item
from upfit.output import Meter
from upfit.text.windows import encode, prefix_ids


@dataclass(frozen=True)
class Task:
    """`size` is the paper's, `least` the smallest that is still the task. `splits`: rows of the table, and how their items are
    made at a size. The first row is in distribution; others say what they change."""

    size: int
    least: int
    unit: str
    splits: dict[str, Callable[[random.Random, int], Item]]


def _count(draw: random.Random, size: int, variables: int, times: int) -> Item:
    return counting.make(draw, variables, times * size)


def _flip(draw: random.Random, size: int, ignore: float) -> Item:
    return flipflop.make(draw, ignore, 2 * size)


def _copy(draw: random.Random, size: int, blanks: float) -> Item:
    return selective_copy.make(draw, round(blanks * size), size)


TASKS = {
    "counting": Task(
        counting.MAX_STEPS,
        counting.LEAST_STEPS,
        "steps",
        {
            f"{variables} variable{'s' * (variables > 1)}{longer}": partial(_count, variables=variables, times=times)
            for variables in counting.VARIABLES
            for longer, times in (("", 1), (", longer", 2))
        },
    ),
    "flipflop": Task(
        flipflop.LENGTH // 2,
        2,
        "instructions",
        {split: partial(_flip, ignore=flipflop.IGNORE[split]) for split in ("in distribution", "sparse")},
    ),
    "selective-copy": Task(
        selective_copy.COPIED,
        2,
        "tokens to copy",
        {split: partial(_copy, blanks=blanks) for split, blanks in selective_copy.BLANKS.items()},
    ),
}


@dataclass(frozen=True)
class Question:
    """One item in tokens: `ids` [T]; `answers` are stretches of them (first, last + 1), of the symbols `symbols`."""

    split: str
    size: int
    unit: str
    ids: np.ndarray
    answers: tuple[tuple[int, int], ...]
    symbols: tuple[str, ...]


def make_questions(name: str, tokenizers: list[Any], count: int, length: int, seed: int = 0) -> list[list[Question]]:
    """For each tokenizer the same items, `count` of each split, about as large as fits `length` tokens, at most as the paper's.

    Raises UpfitError when not even a small one fits, or a tokenizer does not keep the symbols apart.
    """
    task, size = TASKS[name], TASKS[name].size
    prefixes = [prefix_ids(tokenizer) for tokenizer in tokenizers]
    while True:
        items = []
        for split, make in task.splits.items():
            draw = random.Random(f"{seed} {split}")
            items += [(split, make(draw, size)) for _ in range(count)]
        asked = [
            [_question(name, tokenizer, prefix, split, size, item) for split, item in items]
            for tokenizer, prefix in zip(tokenizers, prefixes, strict=True)
        ]
        longest = max(len(question.ids) for questions in asked for question in questions)
        if longest <= length:
            return asked
        if size <= task.least:
            raise UpfitError(f"--probe {name} has texts of {longest} tokens at its smallest, not {length}; give --probe-length")
        size = max(task.least, min(size - 1, size * length // longest))


def _question(name: str, tokenizer: Any, prefix: list[int], split: str, size: int, item: Item) -> Question:
    text, spans = item.text()
    ((ids, ends),) = encode(tokenizer, [text])
    answers = []
    for first, last in (spans[at] for at in item.answers):
        low, high = bisect_right(ends, first), bisect_right(ends, last)  # tokens that end inside the symbol
        begins = ends[low - 1] if low else 0
        if low == high or begins < first - 1 or ends[high - 1] != last:  # the space before it may be in its token, no more
            raise UpfitError(f"--probe {name} needs a tokenizer that keeps symbols with a space between apart")
        answers.append((low + len(prefix), high + len(prefix)))
    symbols = tuple(item.tokens[at] for at in item.answers)
    return Question(split, size, TASKS[name].unit, np.array([*prefix, *ids]), tuple(answers), symbols)


@dataclass(frozen=True)
class Answered:
    """What a model made of one question: of how many answers how many were right, and the nats that all of them cost."""

    split: str
    answers: int
    right: int
    nats: float


@torch.inference_mode()
def probe(model: Any, questions: list[Question], meter: Meter) -> list[Answered]:
    """Ask `model` one question after the other."""
    answered = []
    for question in questions:
        ids = torch.from_numpy(question.ids).to(model.device)
        places = [at for first, last in question.answers for at in range(first, last)]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, [at - 1 for at in places]].float()  # [A, vocabulary]
        hits = dict(zip(places, (logits.argmax(-1) == ids[places]).tolist(), strict=True))
        nats = float(torch.nn.functional.cross_entropy(logits, ids[places], reduction="sum"))
        right = sum(all(hits[at] for at in range(first, last)) for first, last in question.answers)
        answered.append(Answered(question.split, len(question.answers), right, nats))
        meter.advance(1)
    return answered


def summary(answered: list[Answered], questions: list[Question]) -> SyntheticTask:
    """For each split means with 95 % intervals over items, and the share of its commonest answer."""
    splits = {}
    for split in dict.fromkeys(question.split for question in questions):
        own = [question for question in questions if question.split == split]
        symbols = Counter(symbol for question in own for symbol in question.symbols)
        answers, right, nats = _columns(answered, split)
        splits[split] = Split(
            accuracy=mean_interval(right, answers),
            nats_per_answer=mean_interval(nats, answers),
            commonest_answer=max(symbols.values()) / symbols.total(),
            answers=symbols.total(),
            items=len(own),
            tokens=sum(len(question.ids) for question in own),
        )
    return SyntheticTask(questions[0].size, questions[0].unit, splits)


def compared(first: list[Answered], second: list[Answered]) -> dict[str, Any]:
    """First minus second for each split, paired by item."""
    differences: dict[str, Any] = {}
    for split in dict.fromkeys(answered.split for answered in first):
        answers, *own = _columns(first, split)
        _, *other = _columns(second, split)
        differences[split] = {
            name: difference_interval(a, answers, b, answers).record()
            for name, a, b in zip(("accuracy", "nats_per_answer"), own, other, strict=True)
        }
    return differences


def _columns(answered: list[Answered], split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers, right ones and nats of each item of a split."""
    rows = np.array([(item.answers, item.right, item.nats) for item in answered if item.split == split], dtype=np.float64)
    return rows[:, 0], rows[:, 1], rows[:, 2]
