"""The probes of long contexts, as data: what the context is made of, what is asked, how an answer is scored.

`pattern` is named as in the training families (`upfit/longcontext/ask/template.py`) where a model can learn the same from them,
so that a result can say whether its model was trained on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from upfit.longcontext.probes import hidden, pieces, scores
from upfit.longcontext.probes.hidden import Hidden
from upfit.longcontext.probes.pieces import Piece
from upfit.text import Document

Generator = np.random.Generator


@dataclass(frozen=True)
class Family:
    """Contexts are of pieces, `from_text` in the text where there are enough and else `invented`, or running text with
    statements that `hide` gives (generator, how many, how many are asked together). `question` and the answer's beginning
    `lead` quote the key. `relaxed` (key, parts, what is said) is the score told as average, `film` FILM's own."""

    pattern: str
    question: str
    lead: str
    relaxed: Callable[[str, Sequence[str], str], float] = scores.share_said
    from_text: Callable[[list[Document], Generator], list[Piece]] | None = None
    invented: Callable[[Generator], Piece] | None = None
    hide: Callable[[Generator, int, int], list[Hidden]] | None = None
    film: scores.FilmScore | None = None


FAMILIES = {
    "val-document": Family(
        "sentence, both ways",
        'Copy the sentence of the text in which these words stand: "{key}"',
        "The whole sentence reads:",
        scores.beyond_key,
        pieces.found_sentences,
        pieces.invented_sentence,
        film=scores.film_words,
    ),
    "val-code": Family(
        "code, backward",
        "In the body of which function does this line stand: `{key}`",
        "The function with this line is named",
        from_text=pieces.found_functions,
        invented=pieces.invented_function,
        film=scores.film_substring,
    ),
    "val-database": Family(
        "key and value, both ways",
        "Which label and description has the record [{key}]?",
        "[{key}]",
        invented=pieces.invented_record,
        film=scores.film_either,
    ),
    "key-value": Family(
        "key and value, both ways", 'Which value belongs to the key "{key}"?', '"{key}":', invented=pieces.invented_pair
    ),
    "multi-needle": Family(
        "key and value, both ways", "What is the code of {key}?", "The code of {key} is", hide=hidden.needles
    ),
    "variable-tracking": Family(
        "variable tracking",
        "Which variables are {key}, directly or because of another one?",
        "The variables that are {key} are",
        hide=hidden.chains,
    ),
}
