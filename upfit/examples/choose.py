"""Draws some of many, evenly, in one pass."""

import random
from collections.abc import Iterable
from typing import TypeVar

SEED = 20240229
MOST_READ = 500_000  # records of files larger than this are read to here

T = TypeVar("T")


def draw(items: Iterable[T], count: int) -> tuple[list[T], int]:
    """(`count` of the items in their order, each as likely to be there as any other, or all where there are fewer; how many
    there were, up to MOST_READ). The same items give the same choice."""
    source = random.Random(SEED)
    chosen: list[tuple[int, T]] = []
    number = 0
    for number, item in enumerate(items, 1):
        if len(chosen) < count:
            chosen.append((number, item))
        elif (place := source.randrange(number)) < count:
            chosen[place] = (number, item)
        if number == MOST_READ:
            break
    return [item for _, item in sorted(chosen, key=lambda pair: pair[0])], number
