"""Selective copy: tokens among blanks, and then the tokens once more without them.

    c _ a _ _ c f _ c a c f

CoPE paper, section 4, after Gu and Dao (arXiv 2312.00752). As told of it: 16 symbols with the blank; 128 tokens to copy and in
training 128 blanks, where the paper tests with 64 (dense) and 256 (sparse) too. So the token to copy is always as many tokens
back as there are to copy, however many blanks lie between: it is found by counting what is not blank.

Assumed, as no code is public: tokens are uniform and independent, all orders of tokens and blanks are equally likely, and the
copy follows at once, with no symbol to announce it. All of the copy is scored.
"""

import random

from upfit.evaluate.synthetic.items import Item

BLANK = "_"
VOCABULARY = (BLANK, *"abcdefghijklmno")
COPIED = 128
BLANKS = {"in distribution": 1.0, "dense": 0.5, "sparse": 2.0}  # blanks for each token to copy


def make(draw: random.Random, blanks: int = COPIED, copied: int = COPIED) -> Item:
    """`copied` tokens and `blanks` blanks in any order, followed by the tokens: `blanks` + 2 · `copied` symbols."""
    symbols = draw.choices(VOCABULARY[1:], k=copied)
    places = set(draw.sample(range(blanks + copied), copied))
    left = iter(symbols)
    read = [next(left) if at in places else BLANK for at in range(blanks + copied)]
    return Item((*read, *symbols), tuple(range(blanks + copied, blanks + 2 * copied)))
