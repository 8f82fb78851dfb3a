"""Questions about a segment of prose: which words stood in a gap, which sentence comes next or before."""

import re

import numpy as np

from upfit.longcontext.segments import Segments

SENTENCE = re.compile(r"[^.!?\n]*[^.!?\n\s][.!?](?=\s|$)")
NAME = re.compile(r"(?<=[a-z,] )(?:[A-Z][a-z]+(?: [A-Z][a-z]+)*|[A-Z]{2,6}|\d[\d,.]*\d)(?=[ ,.;!?])")
WORDS = range(8, 41)  # of a sentence that is asked about
LEAST_KEY = 24  # characters
Question = tuple[str, str, tuple[str, ...]]  # question, answer, keys


def sentences(text: str) -> list[str]:
    """Whole sentences of a text, in order; those that stand in it twice are left out."""
    candidates = [" ".join(match.group().split()) for match in SENTENCE.finditer(text)]
    return [sentence for sentence in candidates if len(sentence.split()) in WORDS and text.count(sentence) == 1]


def cloze(segments: Segments, index: int, rng: np.random.Generator) -> Question | None:
    """A name or number is taken out of a sentence."""
    gaps = [(sentence, match) for sentence in sentences(segments.text(index)) for match in NAME.finditer(sentence)]
    gaps = [(sentence, match) for sentence, match in gaps if sentence.count(match.group()) == 1]
    if not gaps:
        return None
    sentence, match = gaps[int(rng.integers(len(gaps)))]
    key = max(sentence[: match.start()], sentence[match.end() :], key=len).strip()
    if len(key) < LEAST_KEY:
        return None
    gapped = f"{sentence[: match.start()]}____{sentence[match.end() :]}"
    return f'One sentence of the text reads, with a gap: "{gapped}" What fills the gap?', match.group(), (key,)


def neighbour(segments: Segments, index: int, rng: np.random.Generator) -> Question | None:
    """The sentence after, or before, a sentence of the text."""
    text = segments.text(index)
    lines = sentences(text)
    flat = " ".join(text.split())
    pairs = [(a, b) for a, b in zip(lines, lines[1:], strict=False) if f"{a} {b}" in flat and text.count(b) == 1]
    if not pairs:
        return None
    first, second = pairs[int(rng.integers(len(pairs)))]
    if rng.integers(2):
        return f'Which sentence comes right after this one: "{first}"', second, (first,)
    return f'Which sentence comes right before this one: "{second}"', first, (second,)
