"""Examples for encoder-decoders where there is plain text alone: what they were pretrained to do with it.

spans      T5 and its kin, whose tokenizers have sentinels: spans are left out, and the decoder writes them
gaps       Pegasus, whose tokenizer has a mask for sentences: the decoder writes the sentences that are left out
denoising  BART and its kin, whose tokenizers have a mask: spans are masked, and the decoder writes the whole text
copying    models that translate, and whatever else there is: the decoder writes what was read
"""

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from upfit.errors import UpfitError
from upfit.examples.model_inputs import Example
from upfit.examples.pairs import pair_examples, set_languages
from upfit.examples.targets import Decoder, make, shifted, target_ids
from upfit.output import Output
from upfit.text import Document
from upfit.text.plain import pieces
from upfit.text.spans import MEAN_SPAN, Vocabulary, corrupt, cut, sentinels, sizes_of
from upfit.text.tokenizer import encode_texts

SEED = 20240229
LENGTH = 512  # tokens of a piece of text, at most: of T5's and BART's pretraining
LEAST = 16  # tokens of a piece, at least
BYTES_A_TOKEN = 3  # a piece rather has too few tokens than some that are left off
MASKED = 0.3  # of the tokens, in BART's pretraining (Lewis et al. 2020, arXiv 1910.13461, section 4)
GAPS = 0.3  # of the sentences, in Pegasus's (Zhang et al. 2020, arXiv 1912.08777, section 6.1)
SENTENCE = re.compile(r"(?<=[.!?])\s+")
SENTENCE_MASK = "<mask_1>"
BETTER = "text like what the model will serve, in pairs of what is read and written, is better"

Maker = Callable[[str, int], Example | None]


def examples_of_text(
    documents: list[Document], tokenizer: Any, decoder: Decoder, count: int, flag: str, output: Output
) -> tuple[list[Example], str]:
    """About `count` examples made of pieces of the documents, and what was made of them. That, and what it costs, is noted on
    `output`. Raises UpfitError where the documents have too little text."""
    way, task, make_one = _way(tokenizer, decoder, output)
    length = min(LENGTH, decoder.reads, decoder.writes)
    examples: list[Example] = []
    for number, (text, document) in enumerate(spread_pieces(documents, length * BYTES_A_TOKEN)):
        example = make_one(text, number)
        if example is not None:
            examples.append(Example(example.keywords, example.decoder_ids, example.labels, text, document))
        if len(examples) == count:
            break
    if not examples:
        raise UpfitError(f"{flag} has too little text: no piece of {LEAST} tokens; give more")
    output.note(f"{flag}: no pairs of texts, so {task}; {BETTER}")
    return examples, way


def _way(tokenizer: Any, decoder: Decoder, output: Output) -> tuple[str, str, Maker]:
    """The way that the model was pretrained, by the tokens it has for it: its name, what is noted, and the function."""
    length = min(LENGTH, decoder.reads, decoder.writes)
    if stand_ins := sentinels(tokenizer):
        vocabulary = Vocabulary(stand_ins, decoder.end)
        return "spans", "spans of text are left out, as T5 was pretrained", _Spans(tokenizer, decoder, vocabulary, length)
    if SENTENCE_MASK in tokenizer.get_vocab():
        return "gaps", "sentences of text are left out, as Pegasus was pretrained", _Gaps(tokenizer, decoder)
    if tokenizer.mask_token_id is not None and not translates(tokenizer):
        return "denoising", "spans of text are masked, as BART was pretrained", _Denoising(tokenizer, decoder, length)
    set_languages(tokenizer, "", "", output)
    return "copying", "the decoder writes the text that was read", _Copying(tokenizer, decoder)


def translates(tokenizer: Any) -> bool:
    """Whether texts to be read and to be written are not alike for this tokenizer."""
    return hasattr(tokenizer, "tgt_lang") or hasattr(tokenizer, "target_lang")


def spread_pieces(documents: list[Document], nbytes: int) -> Iterator[tuple[str, str]]:
    """Pieces of about `nbytes` bytes and the names of their documents: one at random of each document, kinds in turn, then
    another one of each, until there are no more. The same documents give the same pieces."""
    source = random.Random(SEED)
    kinds = sorted({document.kind for document in documents})
    queues = {kind: [document for document in documents if document.kind == kind] for kind in kinds}
    for queue in queues.values():
        source.shuffle(queue)
    left: dict[str, list[tuple[list[str] | None, Document]]] = {kind: [(None, d) for d in queues[kind]] for kind in kinds}
    while any(left.values()):
        for kind in [kind for kind in kinds if left[kind]]:
            parts, document = left[kind].pop(0)
            parts = parts if parts is not None else [part for part in pieces(document.text, nbytes) if part.strip()]
            if parts:
                yield parts.pop(source.randrange(len(parts))), document.name
                left[kind] += [(parts, document)] if parts else []


class _Spans:
    """T5's way: the encoder reads sentinels for spans, the decoder writes what they stand for."""

    def __init__(self, tokenizer: Any, decoder: Decoder, vocabulary: Vocabulary, length: int) -> None:
        self.tokenizer, self.decoder, self.vocabulary, self.length = tokenizer, decoder, vocabulary, length
        while sizes_of(self.length).spans > len(vocabulary.sentinels):
            self.length -= 1

    def __call__(self, text: str, number: int) -> Example | None:
        ids = encode_texts(self.tokenizer, [text])["input_ids"][0][: self.length]
        if len(ids) < LEAST:
            return None
        random = np.random.default_rng([SEED, number])
        inputs, labels = corrupt(np.array(ids), sizes_of(len(ids)), self.vocabulary, random)
        return make({"input_ids": torch.from_numpy(inputs)}, *shifted(labels.tolist(), self.decoder), text, "")


class _Denoising:
    """BART's way: spans, three tokens long on average, are each replaced by one mask."""

    def __init__(self, tokenizer: Any, decoder: Decoder, length: int) -> None:
        self.tokenizer, self.decoder, self.length = tokenizer, decoder, length
        self.before, self.after = around(tokenizer)

    def __call__(self, text: str, number: int) -> Example | None:
        most = self.length - len(self.before) - len(self.after) - 1
        ids = encode_texts(self.tokenizer, [text])["input_ids"][0][:most]
        if len(ids) < LEAST:
            return None
        random = np.random.default_rng([SEED, number])
        noisy = masked(np.array(ids), self.tokenizer.mask_token_id, random).tolist()
        source = torch.tensor(self.before + noisy + self.after)
        return make({"input_ids": source}, *shifted(self.before + ids + self.after, self.decoder), text, "")


class _Gaps:
    """Pegasus's way: some of the sentences are each replaced by a mask, and written one after the other."""

    def __init__(self, tokenizer: Any, decoder: Decoder) -> None:
        self.tokenizer, self.decoder = tokenizer, decoder

    def __call__(self, text: str, number: int) -> Example | None:
        sentences = SENTENCE.split(text)
        if len(sentences) < 2:
            return None
        gaps = set(random.Random(SEED + number).sample(range(len(sentences)), max(1, round(GAPS * len(sentences)))))
        source = " ".join(SENTENCE_MASK if place in gaps else sentence for place, sentence in enumerate(sentences))
        target = " ".join(sentences[place] for place in sorted(gaps))
        return pair_examples([((source, target), "")], self.tokenizer, self.decoder)[0]


class _Copying:
    def __init__(self, tokenizer: Any, decoder: Decoder) -> None:
        self.tokenizer, self.decoder = tokenizer, decoder

    def __call__(self, text: str, number: int) -> Example | None:
        if len(target_ids(self.tokenizer, [text])[0]) < LEAST:
            return None
        return pair_examples([((text, text), "")], self.tokenizer, self.decoder)[0]


def masked(ids: np.ndarray, mask: int, random: np.random.Generator) -> np.ndarray:
    """The ids with MASKED of them in spans of MEAN_SPAN on average, each span replaced by one `mask`."""
    lost = max(1, round(MASKED * len(ids)))
    spans = max(1, round(lost / MEAN_SPAN))
    parts: list[Any] = []
    at = 0
    for before, gone in zip(cut(len(ids) - lost, spans, random), cut(lost, spans, random), strict=True):
        parts += [ids[at : at + before], [mask]]
        at += before + gone
    return np.concatenate([*parts, ids[at:]]).astype(np.int64)


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind every text that is read."""
    plain = encode_texts(tokenizer, ["a b"])["input_ids"][0]
    whole = encode_texts(tokenizer, ["a b"], add_special_tokens=True)["input_ids"][0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
