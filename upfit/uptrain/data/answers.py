"""Questions on long contexts as rows: the model reads all of a row, and learns only the answer (IN2, arXiv 2404.16811,
section 3)."""

import hashlib
from functools import cached_property

import numpy as np

from upfit.errors import UpfitError
from upfit.longcontext.contexts import CONTEXTS, ITEMS, SEGMENTS, SETTINGS, Contexts
from upfit.longcontext.segments import ABOUT
from upfit.uptrain.data.rows import IGNORE, Row, ShuffledRows

LOOKED_AT = 256  # examples whose lengths stand for all


class AnswerRows(ShuffledRows):
    """The examples of a folder of `upfit synth`, each a row of its own length, labels at the answer and its end token alone."""

    def __init__(self, contexts: Contexts, holdout: int, seed: int) -> None:
        self.contexts = contexts
        super().__init__(len(contexts), holdout, seed)
        if len(self.training) == 0:
            raise UpfitError(f"{contexts.folder} holds no example; make some with upfit synth")

    def at(self, row: int) -> Row:
        ids, begins = self.contexts[row]
        tokens = ids.astype(np.int64)
        labels = tokens[1:].copy()
        labels[: begins - 1] = IGNORE
        return Row(tokens[:-1], np.arange(len(labels)), labels)

    def empty(self) -> Row:
        return Row(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.full(1, IGNORE))

    def arranged(self, rows: list[int]) -> list[int]:
        """Longest first: rows of like length share a micro-batch and are given to the processes in turn."""
        return sorted(rows, key=lambda row: -self.contexts.plan(row).tokens)

    @property
    def longest(self) -> int:
        """No example has more tokens."""
        return self.contexts.settings["options"]["max_tokens"]

    @cached_property
    def mean_length(self) -> int:
        """Tokens of an example, on average over examples spread evenly over the folder, rounded up."""
        total = len(self.contexts)
        lengths = [len(self.at(at).labels) for at in sorted({total * part // LOOKED_AT for part in range(LOOKED_AT)})]
        return -(-sum(lengths) // len(lengths))


def fingerprint(contexts: Contexts) -> str:
    """Equal for equal examples: the segments are told with the hash of their text, the settings with that of the tokenizer."""
    digest = hashlib.sha256()
    for name in (SETTINGS, ITEMS, CONTEXTS, f"{SEGMENTS}/{ABOUT}"):
        digest.update((contexts.folder / name).read_bytes())
    return digest.hexdigest()
