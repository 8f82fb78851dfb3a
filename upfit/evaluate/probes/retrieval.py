"""`--probe val-document|val-code|val-database|key-value|multi-needle|variable-tracking`: what is within a model's reach?

`upfit/longcontext/probes` makes the contexts, one question for each depth of each; here a model answers them, and the answers
are told by length and depth. Two measures: the score of the greedy answer, and the loss of the true one, which tells depths
apart long before a small model says a whole answer right.

Legend: C contexts of one length, D depths.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from upfit.evaluate.probes import depths
from upfit.evaluate.probes.reader import Reader
from upfit.evaluate.probes.summaries import DepthRow, Depths, FilmScore
from upfit.longcontext.probes import scores
from upfit.longcontext.probes.contexts import Laid
from upfit.longcontext.probes.families import FAMILIES
from upfit.output import Meter


@dataclass(frozen=True)
class Answered:
    """What a model made of one context: the text said at each depth, and its scores and nats a token of the true answer [D]."""

    length: int
    texts: tuple[str, ...]
    relaxed: np.ndarray
    strict: np.ndarray
    nats: np.ndarray


@torch.inference_mode()
def probe(model: Any, samples: list[Laid], meter: Meter) -> list[Answered]:
    """Read each context once and ask its questions."""
    reader = Reader(model, samples[0].tokenizer, samples[0].ids)
    answered = []
    for laid in samples:
        cache = reader.read(laid.ids)
        replies = [reader.answer(cache, asks, answer) for asks, answer in zip(laid.asks, laid.answers, strict=True)]
        texts = tuple(_line(laid.tokenizer.decode(reply.generated)) for reply in replies)
        answered.append(Answered(laid.length, texts, *_scored(laid, texts), np.array([reply.nats for reply in replies])))
        meter.advance(1)
    return answered


def _line(text: str) -> str:
    """The first line of what was said that holds anything."""
    return text.strip().split("\n")[0].strip()


def _scored(laid: Laid, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    family, pairs = FAMILIES[laid.name], list(zip(laid.questions, texts, strict=True))
    relaxed = [family.relaxed(question.key, question.parts, text) for question, text in pairs]
    strict = [scores.strict(question.answer, text) for question, text in pairs]
    return np.array(relaxed), np.array(strict)


def summary(replies: list[Answered], samples: list[Laid]) -> Depths:
    """For each length: averages, gaps with their null, floors, and everything by depth. What the model was trained on is not
    known here."""
    rows = {}
    for length in dict.fromkeys(laid.length for laid in samples):
        pairs = [(answered, laid) for answered, laid in zip(replies, samples, strict=True) if laid.length == length]
        rows[str(length)] = _one_length([answered for answered, _ in pairs], [laid for _, laid in pairs])
    return Depths(FAMILIES[samples[0].name].pattern, samples[0].source, rows, trained_on=False)


def _one_length(answered: list[Answered], samples: list[Laid]) -> DepthRow:
    relaxed, strict, nats = (np.array([getattr(each, name) for each in answered]) for name in ("relaxed", "strict", "nats"))
    average, lowest = depths.average(relaxed), floor(samples)
    gap, nats_gap = depths.gap(relaxed), depths.gap(nats)
    at = np.array([[question.depth for question in laid.questions] for laid in samples])
    return DepthRow(
        contexts=len(samples),
        tokens=float(np.mean([len(laid.ids) for laid in samples])),
        average=average,
        gap=gap.value,
        null_gap=gap.null,
        p_value=gap.p_value,
        floor=lowest,
        normalised=(average.mean - lowest) / (1 - lowest),
        strict=depths.average(strict),
        answer_nats_per_token=depths.average(nats),
        nats_gap=nats_gap.value,
        nats_null_gap=nats_gap.null,
        nats_p_value=nats_gap.p_value,
        depths=at.mean(0).tolist(),
        scores=relaxed.mean(0).tolist(),
        strict_scores=strict.mean(0).tolist(),
        nats=nats.mean(0).tolist(),
        film=_film(answered, samples),
    )


def floor(samples: list[Laid]) -> float:
    """The mean score of who answers with the question's own key, or, where that is more, with another answer of the context,
    the example's among them."""
    relaxed = FAMILIES[samples[0].name].relaxed
    echo, other = [], []
    for laid in samples:
        for own in laid.questions:
            echo.append(relaxed(own.key, own.parts, own.key))
            others = [other_question for other_question in (*laid.questions, laid.example) if other_question is not own]
            other += [relaxed(own.key, own.parts, other_question.answer) for other_question in others]
    return float(max(np.mean(echo), np.mean(other)))


def _film(answered: list[Answered], samples: list[Laid]) -> FilmScore | None:
    """The same answers as FILM scores and bins them, contexts as its sets; None for a probe that FILM has not."""
    score = FAMILIES[samples[0].name].film
    if score is None:
        return None
    rows = [
        [score(question.parts, text) for question, text in zip(laid.questions, reply.texts, strict=True)]
        for laid, reply in zip(samples, answered, strict=True)
    ]
    positions = np.array([[question.position for question in laid.questions] for laid in samples])
    bins = scores.film_bins(positions, np.array(rows))
    means = [float(values.mean()) for values in bins]
    gap = max(means) - min(means) if len(means) > 1 else None
    return FilmScore(float(np.mean(means)), gap, means) if means else None


def compared(first: list[Answered], second: list[Answered]) -> dict[str, Any]:
    """First minus second at each length, paired by context."""
    differences = {}
    for length in dict.fromkeys(answered.length for answered in first):
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.length == length]
        differences[str(length)] = {
            name: depths.compared(
                *(np.array([getattr(answered, field) for answered in side]) for side in zip(*pairs, strict=True))
            )
            for name, field in (("score", "relaxed"), ("answer_nats_per_token", "nats"))
        }
    return {"lengths": differences}
