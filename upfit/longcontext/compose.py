"""Chooses the segments of a context and their order. The choice takes a hundred bytes; the context is made from it when it is
needed.

A context is a pure function of the corpus, the item and its recipe. Lengths are spread evenly over the range asked for, and so
are the places of the first piece, so that a small set is as even as a large one (IN2 leaves both to chance).
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from upfit.longcontext.items import Item, generator
from upfit.longcontext.segments import JOIN, Segments
from upfit.longcontext.wording import ANSWERED, ASKED, Wording


@dataclass(frozen=True)
class ContextPlan:
    """`tokens`: of the whole example, at most. `depth` [0, 1): where the first piece goes. `skip`: numbers, in the order of
    drawing, of fillers that would have made the question ambiguous."""

    item: int
    tokens: int
    depth: float
    skip: tuple[int, ...] = ()

    def line(self) -> str:
        record: dict[str, Any] = {"item": self.item, "tokens": self.tokens, "depth": round(self.depth, 6)}
        return json.dumps(record | ({"skip": list(self.skip)} if self.skip else {}), separators=(",", ":"))

    @staticmethod
    def read(line: str) -> "ContextPlan":
        record = json.loads(line)
        return ContextPlan(record["item"], record["tokens"], record["depth"], tuple(record.get("skip", ())))


@dataclass(frozen=True)
class Context:
    """`parts`: numbers of segments and texts, in order. `places`: where the pieces are among them."""

    parts: list[int | str]
    places: list[int]


class Composer:
    """Makes recipes for a corpus and a tokenizer, and contexts of recipes. `count` examples have `least` to `most` tokens."""

    def __init__(self, segments: Segments, wording: Wording, seed: int, count: int, least: int, most: int) -> None:
        self.segments, self.wording, self.seed = segments, wording, seed
        self.count, self.least, self.most = count, least, most
        self.tokens = lru_cache(maxsize=1)(wording.tokens)  # a recipe is tried, then used, for one item at a time

    def plan(self, item: Item, short_share: float) -> ContextPlan:
        """A length and a depth of a stratum of this item's own, and what must be left out; of some items the pieces alone."""
        rng = generator(self.seed, "recipe", item.index)
        if generator(self.seed, "short", item.index).random() < short_share:
            return ContextPlan(item.index, 0, 0.0)
        length = (self._stratum("length", item.index) + rng.random()) / self.count
        depth = (self._stratum("depth", item.index) + rng.random()) / self.count
        bare = ContextPlan(item.index, self.least + int(length * (self.most - self.least + 1)), round(float(depth), 6))
        skip: list[int] = []
        keys = [key.encode() for key in item.keys]
        while True:  # a filler left out makes room for another, which is looked at too
            tried = ContextPlan(bare.item, bare.tokens, bare.depth, tuple(skip))
            draws, fillers = self._fillers(item, tried)
            bad = [d for d, f in zip(draws, fillers, strict=True) if any(key in self.segments.raw(int(f)) for key in keys)]
            if not bad:
                return tried
            skip = sorted({*skip, *map(int, bad)})

    def _stratum(self, purpose: str, index: int) -> int:
        """Item `index`'s own of `count` equal parts of a range: all are used, in an order that looks random."""
        rng = generator(self.seed, purpose, 0)
        step = int(rng.integers(1, max(2, self.count)))
        while np.gcd(step, self.count) != 1:
            step = step % self.count + 1
        return (int(rng.integers(self.count)) + index * step) % self.count

    def fits(self, item: Item) -> bool:
        """Whether pieces, decoys, question and answer have room in the longest example: without room, nothing is cut."""
        return self._fixed(item) <= self.most

    def _fixed(self, item: Item) -> int:
        """Tokens of everything but fillers."""
        own = self.tokens(item)
        used = sum(int(self.segments.lengths[piece]) for piece in item.pieces if isinstance(piece, int))
        return len(self.wording.before) + sum(map(len, own.values())) + used

    def _fillers(self, item: Item, plan: ContextPlan) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of draws and the segments drawn: as many, each once, as there is room for."""
        room = plan.tokens - self._fixed(item)
        total = len(self.segments)
        if room <= 0 or not plan.tokens:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        rng = generator(self.seed, "fillers", item.index)
        start, step = int(rng.integers(total)), int(rng.integers(1, max(2, total)))
        while np.gcd(step, total) != 1:
            step = step % total + 1
        guess = min(total, int(2 * room / max(1.0, float(self.segments.lengths.mean()))) + 64 + len(plan.skip))
        while True:
            draws = np.arange(guess)
            drawn = (start + draws * step) % total
            used = [piece for piece in item.pieces if isinstance(piece, int)]
            usable = ~np.isin(drawn, used) & ~np.isin(draws, plan.skip)
            draws, drawn = draws[usable], drawn[usable]
            fits = int(np.searchsorted(np.cumsum(self.segments.lengths[drawn]), room, side="right"))
            if fits < len(drawn) or guess == total:
                return draws[:fits], drawn[:fits]
            guess = min(total, 2 * guess)

    def context(self, item: Item, plan: ContextPlan) -> Context:
        """Fillers in the order drawn; the first piece at its depth, the others and the decoys anywhere."""
        fillers = [int(filler) for filler in self._fillers(item, plan)[1]]
        rng = generator(self.seed, "places", item.index)
        gaps = len(fillers) + 1
        places = [int(plan.depth * gaps), *(int(place) for place in rng.integers(0, gaps, len(item.pieces) - 1))]
        if item.ordered:
            places.sort()
        inserts = [(place, rng.random() if not item.ordered else number, True, piece)
                   for number, (place, piece) in enumerate(zip(places, item.pieces, strict=True))]  # fmt: skip
        inserts += [(int(rng.integers(0, gaps)), rng.random(), False, decoy) for decoy in item.decoys]
        parts: list[int | str] = []
        numbers: dict[int | str, int] = {}
        waiting = sorted(inserts, key=lambda insert: insert[:2])
        at = 0
        for gap in range(gaps):
            while at < len(waiting) and waiting[at][0] == gap:
                if waiting[at][2]:
                    numbers[waiting[at][3]] = len(parts)
                parts.append(waiting[at][3])
                at += 1
            if gap < len(fillers):
                parts.append(fillers[gap])
        return Context(parts, [numbers[piece] for piece in item.pieces])

    def example(self, item: Item, plan: ContextPlan) -> tuple[np.ndarray, int]:
        """Tokens [tokens] uint32 of prompt and answer, and where the answer begins."""
        own, parts = self.tokens(item), self.context(item, plan).parts
        middle = [self.segments.tokens(part) if isinstance(part, int) else own[part] for part in parts]
        prompt = [self.wording.before, *middle, own[ASKED]]
        return np.concatenate([*prompt, own[ANSWERED]]), sum(map(len, prompt))

    def text(self, item: Item, plan: ContextPlan) -> str:
        """The context as text."""
        parts = self.context(item, plan).parts
        return JOIN.join(self.segments.text(part) if isinstance(part, int) else part for part in parts)
