"""Questions without a language model: which families there are, and the question with a given number."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from upfit.longcontext.ask import code, invented, prose
from upfit.longcontext.items import Item, generator
from upfit.longcontext.segments import Segments

TRIES = 64  # segments that are looked at for one question


@dataclass(frozen=True)
class Family:
    """`from_text` asks about a segment, `invent` invents facts; one of them is there. `pattern`: see Item."""

    pattern: str
    from_text: Callable[[Segments, int, np.random.Generator], tuple[str, str, tuple[str, ...]] | None] | None = None
    invent: Callable[[np.random.Generator], invented.Fact] | None = None


FAMILIES = {
    "cloze": Family("gap in a sentence", from_text=prose.cloze),
    "neighbour": Family("neighbouring sentence", from_text=prose.neighbour),
    "code-line": Family("code, backward", from_text=code.line_to_function),
    "code-doc": Family("code, both ways", from_text=code.documented),
    "record": Family("key and value, both ways", invent=invented.record),
    "chain": Family("variable tracking", invent=invented.chain),
    "world": Family("moving things", invent=invented.world),
    "compare": Family("comparison", invent=invented.compare),
    "count": Family("counting", invent=invented.count),
}


def ask(segments: Segments, families: list[str], seed: int, index: int) -> Item | None:
    """Item `index`, a pure function of the corpus and the seed: families take turns; None where no segment gives a question.

    Segments are taken in a random order of their own for each family, so that questions repeat only when all are used up.
    """
    name = families[index % len(families)]
    family, rng = FAMILIES[name], generator(seed, name, index)
    if family.invent is not None:
        fact = family.invent(rng)
        return Item(index, name, family.pattern, fact.question, fact.answer, fact.pieces, fact.keys, fact.decoys, fact.ordered)
    assert family.from_text is not None
    turn = index // len(families)
    for attempt in range(TRIES):
        segment = _shuffled(turn + attempt * 7919, len(segments), generator(seed, name, -1 - attempt))
        asked = family.from_text(segments, segment, rng)
        if asked is not None:
            question, answer, keys = asked
            return Item(index, name, family.pattern, question, answer, (segment,), keys)
    return None


def _shuffled(turn: int, count: int, rng: np.random.Generator) -> int:
    """The `turn`-th of `count` in a random order, without making the whole order: start and step, coprime with the count."""
    start, step = int(rng.integers(count)), int(rng.integers(1, max(2, count)))
    while np.gcd(step, count) != 1:
        step = step % count + 1
    return (start + turn * step) % count
