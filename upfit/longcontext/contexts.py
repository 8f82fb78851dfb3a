"""Reads a finished folder of `upfit synth`, example by example. Contexts are made when they are asked for."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from upfit.bounded import DATA_BYTES, RECORD_BYTES, read_json, read_lines, shaped
from upfit.errors import UpfitError
from upfit.longcontext.compose import Composer, ContextPlan
from upfit.longcontext.items import Item
from upfit.longcontext.segments import Segments
from upfit.longcontext.wording import Wording

SEGMENTS, ITEMS, CONTEXTS, SETTINGS = "segments", "items.jsonl", "contexts.jsonl", "settings.json"


class Contexts(Sequence[tuple[np.ndarray, int]]):
    """`contexts[i]`: tokens [tokens] uint32 of prompt and answer, and where the answer begins.

    Raises UpfitError when `folder` was not written by `upfit synth`.
    """

    def __init__(self, folder: Path, wording: Wording) -> None:
        try:
            self.settings: dict[str, Any] = read_json(folder / SETTINGS, RECORD_BYTES)
            self._items = list(read_lines(folder / ITEMS, DATA_BYTES))
            self._recipes = list(read_lines(folder / CONTEXTS, DATA_BYTES))
        except UpfitError as error:
            raise UpfitError(f"{folder} holds no long-context data ({error}); make some with upfit synth") from error
        self.folder, self.wording = folder, wording
        with self._shaped():
            whole = len(self.composer.segments) > 0 and isinstance(self.settings["patterns"], dict)
            if not whole or len(self._items) != len(self._recipes):
                raise ValueError("its files do not belong together")

    def _shaped(self) -> AbstractContextManager[None]:
        return shaped(f"{self.folder} is not what upfit synth writes; make it again")

    @cached_property
    def composer(self) -> Composer:
        options = self.settings["options"]
        segments = Segments(self.folder / SEGMENTS)
        return Composer(segments, self.wording, options["seed"], len(self), options["min_tokens"], options["max_tokens"])

    def worded(self, wording: Wording) -> "Contexts":
        """The same examples with other words around them."""
        other = copy(self)
        other.__dict__.pop("composer")
        other.wording = wording
        return other

    def __len__(self) -> int:
        return len(self._items)

    def item(self, index: int) -> Item:
        with self._shaped():
            return Item.read(self._items[index])

    def plan(self, index: int) -> ContextPlan:
        with self._shaped():
            return ContextPlan.read(self._recipes[index])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.composer.example(self.item(index), self.plan(index))

    def text(self, index: int) -> str:
        """The context alone, as text."""
        return self.composer.text(self.item(index), self.plan(index))
