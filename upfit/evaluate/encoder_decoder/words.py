"""Words that a model writes of recordings, and how many of them are wrong (word error rate, counted by jiwer)."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin

from upfit.errors import UpfitError
from upfit.evaluate.encoder_decoder.losses import in_order, on_device
from upfit.evaluate.interval import Interval
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.measures import WordErrors
from upfit.examples.model_inputs import IGNORE, Example, together
from upfit.examples.targets import most_written
from upfit.model_files import quiet_transformers
from upfit.output import Meter

LONGER, MORE = 2, 16  # a transcript may have this many times its true one's tokens, and so many more: a broken model never ends
BETWEEN = re.compile(r"[-‐‑–—/]")  # parts words
PUNCTUATION = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True)
class Heard:
    """Of each recording [recordings]: the words of its transcript, and what is wrong in the words that the model wrote."""

    words: np.ndarray
    substituted: np.ndarray
    missing: np.ndarray
    added: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        return self.substituted + self.missing + self.added

    def summary(self) -> WordErrors:
        return WordErrors(
            rate=mean_interval(self.errors, self.words),
            words=int(self.words.sum()),
            substituted=int(self.substituted.sum()),
            missing=int(self.missing.sum()),
            added=int(self.added.sum()),
            recordings=len(self.words),
        )


def difference(heard: Heard, other: Heard) -> Interval:
    """The word error rate of `heard` minus that of `other`, paired by recording."""
    return difference_interval(heard.errors, heard.words, other.errors, other.words)


def normalised(text: str) -> str:
    """In lower case, without punctuation, one space between words."""
    return " ".join(PUNCTUATION.sub("", BETWEEN.sub(" ", text.lower())).split())


def check_jiwer() -> None:
    try:
        import jiwer  # noqa: F401
    except ImportError as error:
        raise UpfitError("counting wrong words needs the package jiwer; install it with: pip install 'upfit[audio]'") from error


def listen(model: Any, examples: list[Example], tokenizer: Any, pad: int, batch: int, meter: Meter) -> Heard:
    """Let the model write each recording's transcript, and count what is wrong. Raises UpfitError where there are no words."""
    texts = transcribe(model, examples, tokenizer, pad, batch, meter)
    return count_errors([example.text for example in examples], texts)


def count_errors(transcripts: list[str], texts: list[str]) -> Heard:
    """Words and errors of each pair; a transcript without words counts nothing but what was added."""
    from jiwer import process_words

    counts = []
    for true, written in zip(map(normalised, transcripts), map(normalised, texts), strict=True):
        if not true:
            counts.append((0, 0, 0, len(written.split())))
            continue
        result = process_words(true, written)
        counts.append((len(true.split()), result.substitutions, result.deletions, result.insertions))
    heard = Heard(*np.array(counts, dtype=np.int64).T)
    if not heard.words.any():
        raise UpfitError("no transcript has a word, so there is no word error rate; give recordings of speech")
    return heard


def transcribe(model: Any, examples: list[Example], tokenizer: Any, pad: int, batch: int, meter: Meter) -> list[str]:
    """What the model writes, greedily, after the tokens that its transcripts begin with."""
    texts = [""] * len(examples)
    for indices in in_order(examples, batch):
        chosen = [examples[index] for index in indices]
        for index, text in zip(indices, _written(model, chosen, tokenizer, pad), strict=True):
            texts[index] = text
        meter.advance(len(indices))
    return texts


@torch.inference_mode()
def _written(model: Any, examples: list[Example], tokenizer: Any, pad: int) -> list[str]:
    prefixes = [prefix(example) for example in examples]
    keywords = on_device(model, together(examples, pad))
    keywords["decoder_input_ids"] = torch.stack(prefixes).to(model.device)
    most = most_written(model.config) - len(prefixes[0])
    limits = [min(LONGER * len(example.labels) + MORE, most) for example in examples]
    with quiet_transformers():  # the mixin's own: Whisper's wants to know of times and languages, which stand in the prefix
        ids = GenerationMixin.generate(model, **keywords, max_new_tokens=max(limits), do_sample=False, num_beams=1)
    rows = ids[:, len(prefixes[0]) :].tolist()
    return [tokenizer.decode(row[:limit], skip_special_tokens=True) for row, limit in zip(rows, limits, strict=True)]


def prefix(example: Example) -> torch.Tensor:
    """What the decoder reads before the first token that counts."""
    return example.decoder_ids[: int((example.labels != IGNORE).nonzero()[0]) + 1]
