"""Questions about facts made up for the purpose and hidden in the text, so that nothing but the context can answer them.

Records (one key, one value, asked in both directions), chains of variables, small worlds in which things are carried about,
numbers to compare, marks to count. All names are random strings, so that none occurs twice.
"""

from dataclasses import dataclass

import numpy as np

LETTERS = np.array(list("BCDFGHJKLMNPQRSTVWXZ"))
VOWELS = np.array(list("aeiou"))
PEOPLE = ("Amara", "Bela", "Chidi", "Dara", "Emil", "Farah", "Goran", "Hana", "Imre", "Jorun", "Kaito", "Leila")
PLACES = (
    "attic",
    "bakery",
    "cellar",
    "courtyard",
    "garage",
    "kitchen",
    "library",
    "orchard",
    "pantry",
    "stable",
    "studio",
    "tower",
)
THINGS = ("compass", "lantern", "ledger", "medal", "mirror", "parcel", "teapot", "thermos", "violin", "whistle")
COLOURS = ("bronze", "crimson", "golden", "purple", "silver", "teal")
DECOYS = range(6, 25)  # made-up records beside the one asked for


@dataclass(frozen=True)
class Fact:
    question: str
    answer: str
    pieces: tuple[str, ...]
    keys: tuple[str, ...]
    decoys: tuple[str, ...] = ()
    ordered: bool = False


def _code(rng: np.random.Generator) -> str:
    return "".join(rng.choice(LETTERS, 3)) + "-" + str(rng.integers(1000, 10_000))


def new_words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct words that no language has."""
    words: dict[str, None] = {}
    while len(words) < count:
        parts = [str(rng.choice(LETTERS)).lower() + str(rng.choice(VOWELS)) for _ in range(4)]
        words["".join(parts).capitalize()] = None
    return list(words)


def _some(rng: np.random.Generator, counts: range) -> int:
    return int(rng.integers(counts.start, counts.stop))


def record(rng: np.random.Generator) -> Fact:
    """One of many records; its key is given and its value asked for, or the other way round."""
    codes = list(dict.fromkeys(_code(rng) for _ in range(2 * _some(rng, DECOYS))))
    codes = codes[: len(codes) // 2 * 2]
    pairs = list(zip(codes[::2], codes[1::2], strict=True))
    lines = [f"Register entry {key}: storage number {value}." for key, value in pairs]
    key, value = pairs[0]
    if rng.integers(2):
        return Fact(f"What is the storage number of register entry {key}?", value, (lines[0],), (key,), tuple(lines[1:]))
    return Fact(f"Which register entry has the storage number {value}?", key, (lines[0],), (value,), tuple(lines[1:]))


def chain(rng: np.random.Generator) -> Fact:
    """A number is handed from name to name; a second chain leads elsewhere."""
    hops = int(rng.integers(2, 5))
    names = new_words(rng, 2 * (hops + 1))
    ours, other = names[: hops + 1], names[hops + 1 :]
    first, second = (str(number) for number in rng.choice(90_000, 2, replace=False) + 10_000)

    def stated(links: list[str], number: str) -> tuple[str, ...]:
        copies = [f"The value of {b} is the value of {a}." for a, b in zip(links, links[1:], strict=False)]
        return (f"The value of {links[0]} is {number}.", *copies)

    question = f"What number is the value of {ours[-1]}?"
    return Fact(question, first, stated(ours, first), tuple(ours), stated(other, second))


def world(rng: np.random.Generator) -> Fact:
    """Somebody takes a thing and walks about; where the thing is at the end follows from all of it, in order."""
    who, other = rng.choice(PEOPLE, 2, replace=False)
    thing, name = rng.choice(THINGS), new_words(rng, 1)[0]
    places = [str(place) for place in rng.choice(PLACES, 4, replace=False)]
    thing = f"{thing} of {name}"
    steps = [f"{who} went to the {places[0]} and took the {thing}.", f"{who}, still with the {thing}, went to the {places[1]}."]
    end = places[1]
    if rng.integers(2):
        steps.append(f"{who} gave the {thing} to {other}, who carried it to the {places[2]}.")
        end = places[2]
    decoys = (f"{other} spoke of the {places[3]} of old.",)
    return Fact(f"Where is the {thing} at the end?", f"in the {end}", tuple(steps), (thing,), decoys, ordered=True)


def compare(rng: np.random.Generator) -> Fact:
    """Two of many measured things: which is more?"""
    names = new_words(rng, _some(rng, DECOYS))
    values = rng.choice(9000, len(names), replace=False) + 1000
    lines = [f"Mount {name} is {value} feet high." for name, value in zip(names, values, strict=True)]
    higher = names[0] if values[0] > values[1] else names[1]
    question = f"Which is higher, Mount {names[0]} or Mount {names[1]}?"
    keys = (f"Mount {names[0]}", f"Mount {names[1]}")
    return Fact(question, f"Mount {higher}", tuple(lines[:2]), keys, tuple(lines[2:]))


def count(rng: np.random.Generator) -> Fact:
    """How many things bear one of several marks: every one of them has to be found."""
    name = new_words(rng, 1)[0]
    ours, other = rng.choice(COLOURS, 2, replace=False)
    marked, rest = int(rng.integers(2, 8)), int(rng.integers(2, 8))
    numbers = rng.choice(900, marked + rest, replace=False) + 100
    lines = [
        f"Crate {number} of the ship {name} bears a {ours if index < marked else other} mark."
        for index, number in enumerate(numbers)
    ]
    question = f"How many crates of the ship {name} bear a {ours} mark?"
    return Fact(question, str(marked), tuple(lines[:marked]), (f"of the ship {name}",), tuple(lines[marked:]))
