"""A question whose answer stands somewhere in a context: what it consists of, and how it is stored."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Item:
    """One question. `pieces` are what it takes to answer it, as texts, or as numbers of segments; `decoys` are texts of the
    same kind that do not answer it. `keys` are strings by which the question names its pieces: they may stand nowhere else in
    the context. `ordered`: the pieces mean something only in their order. `pattern` says what a model learns from it, so that a
    probe of the same pattern is not taken for a new task.
    """

    index: int
    family: str
    pattern: str
    question: str
    answer: str
    pieces: tuple[int | str, ...]
    keys: tuple[str, ...]
    decoys: tuple[str, ...] = ()
    ordered: bool = False
    generator: str = "template"

    def line(self) -> str:
        """As one line of JSON, without what is at its default."""
        defaults = {field.name: field.default for field in fields(self)}
        changed = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        return json.dumps(changed, ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def read(line: str) -> "Item":
        record: dict[str, Any] = json.loads(line)
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        return Item(**fields)


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """The random numbers of one item for one purpose: they depend on nothing else, so work can be split in any way."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
