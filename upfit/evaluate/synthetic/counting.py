"""Counting: a short program sets variables to 0, counts them up, mostly does nothing, and prints one of them.

    pass; a = 0 ; pass; pass; a ++; pass; a ++; print a 2

CoPE paper, section 4 (table 3 and figure 2). Exact, that is, distributed as what the authors' data script draws
(facebookresearch/RAM, projects/cope): the number of steps, uniform; the weights of the operations; an increment which is not
possible (nothing set, or a value of 10) draws the operation again; the printed variable is uniform among those that were set; a
program which sets none is drawn again with another number of steps; the spelling of the symbols; one answer, at the end. As
theirs, a text that is too long loses its beginning, and with it sometimes the last `= 0`: of texts of up to 512 steps, cut to
512 symbols, less than 0.4 % have no answer that can be known.
"""

import random

from upfit.evaluate.synthetic.items import Item

NAMES = ("a", "b", "c", "d", "e")
VARIABLES = (1, 3, 5)  # what the paper tells
WEIGHTS = {"set": 1, "pass": 50, "increment": 7}
LEAST_STEPS, MAX_STEPS = 3, 512
MOST = 10  # a value never goes above


def vocabulary(variables: int) -> tuple[str, ...]:
    """All symbols there are, in a fixed order: 17, 19 or 21 for 1, 3 or 5 variables."""
    return ("pass;", "print", "=", ";", "++;", *(str(value) for value in range(MOST + 1)), *NAMES[:variables])


def make(draw: random.Random, variables: int = 1, max_steps: int = MAX_STEPS, block: int | None = None) -> Item:
    """One program of 3 to `max_steps` steps over `variables` variables, its last `block` symbols if that is given.

    More steps than in training are the paper's longer contexts.
    """
    tokens: list[str] = []
    values: dict[str, int] = {}
    while not values:
        tokens, values = _run(draw, NAMES[:variables], draw.randint(LEAST_STEPS, max_steps))
    asked = draw.choice(list(values))
    tokens += ["print", asked, str(values[asked])]
    item = Item(tuple(tokens), (len(tokens) - 1,))
    return item if block is None else item.trimmed(block)


def _run(draw: random.Random, names: tuple[str, ...], steps: int) -> tuple[list[str], dict[str, int]]:
    """The symbols of `steps` steps, and the values that the variables have after them."""
    tokens: list[str] = []
    values: dict[str, int] = {}
    operations, weights = list(WEIGHTS), list(WEIGHTS.values())
    while steps:
        (operation,) = draw.choices(operations, weights)
        if operation == "pass":
            tokens.append("pass;")
        elif operation == "set":
            name = draw.choice(names)
            values[name] = 0
            tokens += [name, "=", "0", ";"]
        else:
            name = draw.choice(list(values)) if values else ""
            if values.get(name, MOST) == MOST:
                continue  # not possible: another operation for this step
            values[name] += 1
            tokens += [name, "++;"]
        steps -= 1
    return tokens, values
