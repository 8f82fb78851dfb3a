"""A finished folder of `upfit synth`, example by example: contexts are made when they are asked for."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from upfit.errors import UpfitError
from upfit.longcontext.compose import Composer, Recipe
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
            self.settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            self._items = (folder / ITEMS).read_text(encoding="utf-8").splitlines()
            self._recipes = (folder / CONTEXTS).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UpfitError(f"{folder} holds no long-context data ({error}); make some with upfit synth") from error
        self.folder, self.wording = folder, wording

    @cached_property
    def composer(self) -> Composer:
        told = self.settings["options"]
        segments = Segments(self.folder / SEGMENTS)
        return Composer(segments, self.wording, told["seed"], len(self), told["min_tokens"], told["max_tokens"])

    def __len__(self) -> int:
        return len(self._items)

    def item(self, index: int) -> Item:
        return Item.read(self._items[index])

    def recipe(self, index: int) -> Recipe:
        return Recipe.read(self._recipes[index])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.composer.example(self.item(index), self.recipe(index))

    def text(self, index: int) -> str:
        """The context alone, as text."""
        return self.composer.text(self.item(index), self.recipe(index))
