"""The text to train on: a folder of token shards, or several with weights, as `code=0.7,prose=0.3`."""

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from upfit.errors import UpfitError
from upfit.uptrain.data.interleave import InterleavedRows
from upfit.uptrain.data.rows import Rows, TextRows
from upfit.uptrain.data.shards import Shards

WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")
MOST_ROWS = 100_000  # after which the order of the sources must begin anew


def parse(text: str) -> list[tuple[Path, Fraction]]:
    """Folders and weights: `"code=0.7,prose=0.3"` → two; what is a folder, or has no "=", is one with weight 1.

    Raises UpfitError for a weight that is missing or 0, a folder that is not there or named twice, or too many digits.
    """
    whole = Path(text).expanduser()
    if "=" not in text or whole.is_dir():
        return [(whole.resolve(), Fraction(1))]
    weighted: list[tuple[Path, Fraction]] = []
    rest = ""
    for piece in text.split(","):  # a folder's name may hold "," and "=" too
        rest = f"{rest},{piece}" if rest else piece
        name, _, weight = rest.rpartition("=")
        if WEIGHT.fullmatch(weight) and Path(name).expanduser().is_dir():
            weighted.append((Path(name).expanduser().resolve(), Fraction(weight)))
            rest = ""
    if rest:
        raise UpfitError(_trouble(rest.split(",")[0], text))
    twice = [folder for folder, count in Counter(folder for folder, _ in weighted).items() if count > 1]
    if twice:
        raise UpfitError(f"{text} names {twice[0]} twice; add up its weights")
    if zero := [folder for folder, weight in weighted if not weight]:
        raise UpfitError(f"{text} gives {zero[0]} the weight 0; give a number above 0, or leave the folder out")
    if sum(whole_weights([weight for _, weight in weighted])) > MOST_ROWS:
        raise UpfitError(f"the weights in {text} have too many digits; round them to five, such as 0.33333")
    return weighted


def _trouble(piece: str, text: str) -> str:
    name, _, weight = piece.rpartition("=")
    if WEIGHT.fullmatch(weight):
        return f"no folder at {name}, named in {text}; give folders of upfit prepare with weights, such as code=0.7,prose=0.3"
    return f"{piece!r} in {text} is no folder with a weight; give them as in code=0.7,prose=0.3"


def whole_weights(weights: list[Fraction]) -> list[int]:
    """Whole numbers in the same proportions, as small as can be."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    return [number // math.gcd(*numbers) for number in numbers]


@dataclass(frozen=True)
class Sources:
    """Opened folders of token shards, and how many of how many rows each gives."""

    shards: list[Shards]
    weights: list[Fraction]

    @classmethod
    def open(cls, text: str) -> "Sources":
        """Raises UpfitError for what `parse` and Shards do not take."""
        weighted = parse(text)
        return cls([Shards(folder) for folder, _ in weighted], [weight for _, weight in weighted])

    @property
    def names(self) -> list[str]:
        """What the sources are called where their losses are told: their folders' names, numbered where some are alike."""
        folders = [shards.folder.name for shards in self.shards]
        alike = len(set(folders)) < len(folders)
        return [f"{name}-{number}" if alike else name for number, name in enumerate(folders, 1)]

    @property
    def argument(self) -> str:
        """What `open` takes to open the same."""
        if len(self.shards) == 1:
            return str(self.shards[0].folder)
        pairs = zip(self.shards, self.weights, strict=True)
        return ",".join(f"{shards.folder}={Decimal(weight.numerator) / weight.denominator:f}" for shards, weight in pairs)

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens in equal shares."""
        if len(self.shards) == 1:
            return self.shards[0].fingerprint
        pairs = zip(self.shards, whole_weights(self.weights), strict=True)
        return hashlib.sha256(" ".join(f"{shards.fingerprint}={weight}" for shards, weight in pairs).encode()).hexdigest()

    def record(self) -> list[dict[str, Any]]:
        """As recipe.json keeps them."""
        pairs = zip(self.shards, self.weights, strict=True)
        return [{"folder": str(shards.folder), "weight": float(weight)} for shards, weight in pairs]

    def rows(self, length: int, a_step: int, holdout: int, seed: int, document_mask: bool) -> Rows:
        """Their tokens in rows of `length`, of which a step takes `a_step`; of `holdout` rows each source has its share, at
        least one. Raises UpfitError when a source has fewer rows than a step takes of it."""
        weights = whole_weights(self.weights)
        total = sum(weights)
        each: list[TextRows] = []
        for number, (shards, weight) in enumerate(zip(self.shards, weights, strict=True)):
            held = -(-holdout * weight // total)
            rows = TextRows(shards, length, held, seed, document_mask, number)
            needed = -(-a_step * weight // total)
            if len(rows.training) < needed:
                raise UpfitError(
                    f"{shards.folder} has {len(rows.training)} rows of {length} tokens to train on, "
                    f"a step takes {needed}; add text or lower --batch-tokens"
                )
            each.append(rows)
        if len(each) == 1:
            return each[0]
        return InterleavedRows(dict(zip(self.names, each, strict=True)), weights)
