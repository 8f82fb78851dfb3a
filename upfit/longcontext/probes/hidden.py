"""Statements hidden in running text, and what is asked of them: several needles, chains of variables.

Needles are asked one or more at a time, as in table 2 of the Differential Transformer (arXiv 2410.05258). Chains are those of
RULER's variable tracking (arXiv 2404.06654): every variable that holds a value has to be named.
"""

import textwrap
from dataclasses import dataclass

import numpy as np

from upfit.longcontext.ask import invented
from upfit.text import Document

HOPS = 2  # from variable to variable in a chain
WIDEST_LINE = 200  # characters of a line of the running text


@dataclass(frozen=True)
class Hidden:
    """`statements`, in order, stand near one depth; the question about them quotes `key`. Other words as in Piece."""

    statements: tuple[str, ...]
    key: str
    answer: str
    parts: tuple[str, ...]
    once: tuple[str, ...]


def needles(rng: np.random.Generator, count: int, asked: int) -> list[Hidden]:
    """`count` codes; each is asked for with `asked` - 1 others, itself first."""
    names, codes = invented.new_words(rng, count), _numbers(rng, count)
    hidden = []
    for own in range(count):
        others = [int(other) for other in rng.permutation(count) if other != own][: asked - 1]
        parts = tuple(codes[at] for at in (own, *others))
        statement = f"The code of {names[own]} is {codes[own]}."
        key = _and([names[at] for at in (own, *others)])
        hidden.append(Hidden((statement,), key, _and(list(parts)), parts, (names[own], codes[own])))
    return hidden


def chains(rng: np.random.Generator, count: int, _asked: int) -> list[Hidden]:
    """`count` chains: a number is given to a variable and handed on, HOPS times."""
    names, numbers = invented.new_words(rng, count * (HOPS + 1)), _numbers(rng, count)
    hidden = []
    for chain, number in enumerate(numbers):
        own = tuple(names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)])
        statements = [f"Let {own[0]} be {number}.", *(f"Let {b} be what {a} is." for a, b in zip(own, own[1:], strict=False))]
        hidden.append(Hidden(tuple(statements), number, _and(list(own)), own, (number, *(f"Let {name} be" for name in own))))
    return hidden


def _numbers(rng: np.random.Generator, count: int) -> list[str]:
    return [str(10_000 + int(number)) for number in rng.choice(90_000, count, replace=False)]


def _and(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def running_lines(documents: list[Document], rng: np.random.Generator, characters: int) -> list[str]:
    """The lines of texts in a random order, up to `characters` or a text more; long lines broken."""
    lines: list[str] = []
    for index in rng.permutation(len(documents)):
        if characters <= 0:
            break
        characters -= len(documents[index].text)
        for line in documents[index].text.split("\n"):
            lines += [line.rstrip()] if len(line) <= WIDEST_LINE else textwrap.wrap(line, WIDEST_LINE)
    return [line for line in lines if line.strip()]
