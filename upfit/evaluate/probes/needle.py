"""`--probe needle`: is a sentence hidden in a long text found, and how much of the attention goes to it?

A needle ("The code of Dunmore is 48213.") stands at one of five depths of real text; the text ends with its beginning again,
and the model has to go on. Told are the share of samples whose every answer token is the model's first choice, the answer's
loss, and for the position that has to predict the answer's first token the attention mass on the answer in the needle, on the
text's first token (where idle heads look), and on the rest; further the largest attention logit and hidden state (top-1), the
outliers that make quantisation hard. Attention mass is as in the Differential Transformer's table 3 (arXiv 2410.05258), with
maps as they reach the values (see `attention_maps.py`), which tells each head's share on the answer too.

Legend: N samples, T tokens, L layers, H heads.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upfit.calibration.observe import Seen
from upfit.errors import UpfitError
from upfit.evaluate.intervals import difference_interval, mean_interval
from upfit.evaluate.probes.attention_maps import MAP_TOKENS, record_by_head, shares, watching
from upfit.evaluate.probes.summaries import Needle
from upfit.output import Meter
from upfit.text import Document
from upfit.text.windows import encode, prefix_ids

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = ("Dunmore", "Halford", "Kestrel", "Marwick", "Norbury", "Ostley", "Penrose", "Quarley", "Rowland", "Stanton", "Thorne")
DIGITS = 5
ROWS_AT_ONCE = 256  # query positions whose logits are in memory together


@dataclass(frozen=True)
class Sample:
    """`ids` [T] end with the answer, which stands at `needle` (first, last + 1) too; `answer` tokens long."""

    ids: np.ndarray
    needle: tuple[int, int]
    answer: int
    depth: float

    @property
    def asks(self) -> int:
        """The position that has to predict the answer's first token."""
        return len(self.ids) - self.answer - 1


def make_samples(documents: list[Document], tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Sample]:
    """`count` samples of at most `length` tokens, the depths in turn. The same for every model with the same tokenizer.

    Raises UpfitError when the text is not long enough or the tokenizer splits the answer differently in the two places.
    """
    drawn, prefix = random.Random(seed), prefix_ids(tokenizer)
    pieces = [ids for ids, _ in encode(tokenizer, [document.text for document in documents])]
    samples: list[Sample] = []
    for number in range(count):
        name, code = drawn.choice(NAMES), "".join(drawn.choices("0123456789", k=DIGITS))
        needle, question = f"\nThe code of {name} is {code}.\n", f"\nThe code of {name} is"
        (needle_ids, _), (question_ids, _), (both_ids, _) = encode(tokenizer, [needle, question, f"{question} {code}"])
        answer = both_ids[len(question_ids) :]
        at = next((i for i in range(len(needle_ids)) if needle_ids[i : i + len(answer)] == answer), None)
        if both_ids[: len(question_ids)] != question_ids or at is None:
            raise UpfitError("--probe needle needs a tokenizer that gives a number the same tokens in both places")
        room = length - len(prefix) - len(needle_ids) - len(both_ids)
        long = [ids for ids in pieces if len(ids) >= room]
        if room < 1 or not long:
            raise UpfitError(
                f"--probe-length {length} does not fit: no text is {max(room, 1)} tokens long; give another length"
            )
        text = drawn.choice(long)
        start = drawn.randrange(len(text) - room + 1)
        depth = DEPTHS[number % len(DEPTHS)]
        before = round(depth * room)
        hay = text[start : start + room]
        ids = [*prefix, *hay[:before], *needle_ids, *hay[before:], *both_ids]
        first = len(prefix) + before + at
        samples.append(Sample(np.array(ids), (first, first + len(answer)), len(answer), depth))
    return samples


def short_sample(documents: list[Document], tokenizer: Any, length: int) -> Sample:
    """A text short enough to keep whole attention maps of, at most `length` tokens, with the needle in its middle."""
    return make_samples(documents, tokenizer, DEPTHS.index(0.5) + 1, min(MAP_TOKENS, length))[-1]


@dataclass
class Watched:
    """What one model did, a number a sample: `right` and `loss` (nats an answer token) [N], `mass` [N, 3] (answer, first token,
    the rest; means over heads), `heads` (mass on the answer) [N][layer][head], and the largest logit and hidden state."""

    right: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    mass: list[list[float]] = field(default_factory=list)
    heads: list[list[list[float]]] = field(default_factory=list)
    logit: float = 0.0
    hidden: float = 0.0


@torch.inference_mode()
def probe(model: Any, samples: list[Sample], meter: Meter) -> Watched:
    """Run the samples one by one, with attention that can be watched."""
    watched, masses = Watched(), list[Tensor]()
    for sample in samples:
        asks = sample.asks
        masses.clear()

        def watch(seen: Seen, sample: Sample = sample) -> None:
            watched.logit = max(watched.logit, largest_logit(seen))
            masses.append(mass(seen, sample))

        ids = torch.from_numpy(sample.ids)[None].to(model.device)
        with watching(model, watch):
            outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        logits = outputs.logits[0, asks:-1].float()
        wanted = ids[0, asks + 1 :]
        watched.right.append(float((logits.argmax(-1) == wanted).all()))
        watched.loss.append(float(torch.nn.functional.cross_entropy(logits, wanted)))
        if masses:
            watched.mass.append(torch.stack([layer.mean(0) for layer in masses]).mean(0).tolist())
            watched.heads.append([layer[:, 0].tolist() for layer in masses])
        watched.hidden = max(watched.hidden, *(float(state.abs().max()) for state in outputs.hidden_states))
        meter.advance(1)
    return watched


def largest_logit(seen: Seen) -> float:
    """The largest |logit| that a query has for a key it may look at."""
    most, tokens = 0.0, seen.q.shape[2]
    for start in range(0, tokens, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, tokens), device=seen.q.device)
        scores, weights = seen.scores(rows, tokens)
        most = max(most, float(scores.masked_fill(weights == 0, 0.0).abs().max()))
    return most


def mass(seen: Seen, sample: Sample) -> Tensor:
    """[H, 3], of the position that asks: each head's shares on the needle's answer, on the first token, on everything else."""
    looked = shares(seen, sample.asks)
    answer, first = looked[:, sample.needle[0] : sample.needle[1]].sum(-1), looked[:, 0]
    return torch.stack([answer, first, 1 - answer - first], -1).cpu()


def summary(watched: Watched, samples: list[Sample]) -> Needle:
    """Means with 95 % intervals over samples, and the share found at each depth."""
    ones = np.ones(len(samples))
    at_depth = {depth: [r for r, s in zip(watched.right, samples, strict=True) if s.depth == depth] for depth in DEPTHS}
    masses = [mean_interval(column, ones) for column in np.array(watched.mass).T] if watched.mass else [None, None, None]
    return Needle(
        accuracy=mean_interval(np.array(watched.right), ones),
        answer_nats_per_token=mean_interval(np.array(watched.loss), ones),
        accuracy_by_depth={str(depth): float(np.mean(right)) for depth, right in at_depth.items() if right},
        largest_logit=watched.logit or None,
        largest_hidden=watched.hidden,
        attention_on_answer=masses[0],
        attention_on_first_token=masses[1],
        attention_on_rest=masses[2],
        attention_by_head=record_by_head(watched.heads) if watched.mass else None,
    )


def record_shown(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """The text whose maps are kept: its tokens, where the needle's answer stands (first, last + 1), which position asks."""
    tokens = [tokenizer.decode([int(id)]) for id in sample.ids]
    return {"tokens": tokens, "needle": list(sample.needle), "asks": sample.asks}


def compared(first: Watched, second: Watched) -> dict[str, Any]:
    """First minus second, paired by sample."""
    ones = np.ones(len(first.right))
    pairs = {"accuracy": (first.right, second.right), "answer_nats_per_token": (first.loss, second.loss)}
    differences = {name: difference_interval(np.array(a), ones, np.array(b), ones).record() for name, (a, b) in pairs.items()}
    if first.mass and second.mass:
        a, b = np.array(first.mass)[:, 0], np.array(second.mass)[:, 0]
        differences["attention_on_answer"] = difference_interval(a, ones, b, ones).record()
    return differences
