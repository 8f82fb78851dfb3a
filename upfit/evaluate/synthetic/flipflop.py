"""Flip-Flop: a register of one bit is written, read, and mostly left alone while other bits go by.

    w 1 i 0 i 1 r 1 w 0 i 1 r 0

Liu et al. 2023 (arXiv 2306.00946, section 3), which the CoPE paper takes up in section 4. FFL(p): instructions and bits in
turn; the first instruction writes, the last one reads, each other one is `i` with probability p and `w` or `r` with half of the
rest; bits after `w` and `i` are fair coins, a bit after `r` is that of the last `w`. Trained on FFL(0.8), of 512 symbols. What
is scored are the bits after `r`: those alone can be known.

Lengths, shares and the splits are those of the data that Liu et al. published. Assumed: that each string ends in a read, as two
reimplementations have it; the card of that data does not say.
"""

import random

from upfit.evaluate.synthetic.items import Item

VOCABULARY = ("w", "r", "i", "0", "1")
LENGTH = 512
IGNORE = {"in distribution": 0.8, "dense": 0.1, "sparse": 0.98}  # p of the training strings and of the two that test


def make(draw: random.Random, ignore: float = 0.8, length: int = LENGTH) -> Item:
    """One string of FFL(`ignore`), `length` symbols long: an even number of at least 4."""
    half = (1 - ignore) / 2
    middle = draw.choices("wri", (half, half, ignore), k=length // 2 - 2)
    tokens: list[str] = []
    bit = ""
    for instruction in ("w", *middle, "r"):
        shown = bit if instruction == "r" else draw.choice("01")
        if instruction == "w":
            bit = shown
        tokens += [instruction, shown]
    return Item(tuple(tokens), tuple(at for at in range(1, length, 2) if tokens[at - 1] == "r"))
