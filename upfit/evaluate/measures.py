"""The parts of what `upfit evaluate` answers. Intervals are of 95 %, over windows, samples, contexts or documents."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from upfit.results import Part, absent


@dataclass(frozen=True)
class Interval(Part):
    """A value with its interval.

    mean: the value
    low: the lower end; None where there is no interval
    high: the upper end
    """

    mean: float
    low: float | None
    high: float | None

    def exp(self) -> "Interval":
        """The perplexity of a loss: exp is monotone, so the ends of the interval stay ends of an interval."""
        low, high = (None if end is None else _exp(end) for end in (self.low, self.high))
        return Interval(_exp(self.mean), low, high)

    def ends(self, digits: int) -> str:
        """`36.87 [31.93, 42.58]`, no decimals from 1000 on; without the brackets where there is no interval."""
        digits = digits if self.mean < 1000 else 0
        return f"{self.mean:.{digits}f}" + ("" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]")

    def half_width(self, digits: int) -> str:
        """`3.6074 ± 0.1440`, for an interval that is symmetric."""
        return f"{self.mean:.{digits}f}" + ("" if self.low is None else f" ± {self.mean - self.low:.{digits}f}")


def _exp(value: float) -> float:
    """e ** value; the largest float where that is too large for one (a broken model), so that JSON can hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return sys.float_info.max


@dataclass(frozen=True)
class Loss(Part):
    """What a text costs a model.

    nats_per_token: mean loss, nats a scored token
    perplexity: e to the mean loss
    bits_per_byte: mean loss, bits a byte of the scored text
    nats_per_token_by_position: mean losses in equal parts of a window, first to last, nats a token
    scored_tokens: number of tokens
    scored_bytes: their length as text, bytes
    """

    nats_per_token: Interval
    perplexity: Interval
    bits_per_byte: Interval
    nats_per_token_by_position: list[float]
    scored_tokens: int
    scored_bytes: int


@dataclass(frozen=True)
class CacheGrowth(Part):
    """Cache of one sequence.

    bytes_per_token: growth while no sliding window is full, bytes a token
    fixed_bytes: what does not depend on the length, bytes
    window: the largest sliding window, tokens; None without one
    bytes_per_token_beyond: growth once all windows are full, bytes a token; None where it was not measured
    dtypes: types of what is kept
    """

    bytes_per_token: float
    fixed_bytes: float
    window: int | None
    bytes_per_token_beyond: float | None
    dtypes: list[str]


@dataclass(frozen=True)
class Needle(Part):
    """Whether a sentence hidden in a long text is found.

    accuracy: share of samples whose every answer token is the first choice
    answer_nats_per_token: loss of the answer, nats a token
    accuracy_by_depth: that share, by the depth of the needle (0 is the start of the text)
    largest_logit: largest attention logit; None for attention that cannot be watched
    largest_hidden: largest absolute value of a hidden state
    attention_on_answer: share of the attention on the needle's answer
    attention_on_first_token: share on the text's first token
    attention_on_rest: share on the rest
    attention_by_head: share on the answer, [layer][head]
    maps: attention maps that were kept: tokens, needle, asks, and heads with their weights
    """

    accuracy: Interval
    answer_nats_per_token: Interval
    accuracy_by_depth: dict[str, float]
    largest_logit: float | None
    largest_hidden: float
    attention_on_answer: Interval | None = absent()
    attention_on_first_token: Interval | None = absent()
    attention_on_rest: Interval | None = absent()
    attention_by_head: list[list[float]] | None = absent()
    maps: dict[str, Any] | None = absent()


@dataclass(frozen=True)
class PositionRow(Part):
    """Loss by position at one length.

    windows: number of windows
    nats_per_token: mean loss, nats a token
    depths: the middle of each part of the window, as a share of it
    nats: mean loss in each part, nats a token
    intervals: the same with intervals
    perplexities: e to the mean loss in each part
    """

    windows: int
    nats_per_token: Interval
    depths: list[float]
    nats: list[float]
    intervals: list[Interval]
    perplexities: list[float]


@dataclass(frozen=True)
class Position(Part):
    """Loss by position.

    lengths: by the length of the windows in tokens
    """

    lengths: dict[str, PositionRow]


@dataclass(frozen=True)
class NullGap(Part):
    """The gap that scores without an effect of depth would show.

    mean: its mean
    p95: its 95th percentile
    """

    mean: float
    p95: float


@dataclass(frozen=True)
class FilmScore(Part):
    """The same answers as FILM scores and bins them.

    average: mean over the bins
    gap: best minus worst bin; None with a single bin
    bins: mean score of each bin
    """

    average: float
    gap: float | None
    bins: list[float]


@dataclass(frozen=True)
class DepthRow(Part):
    """Questions of contexts of one length.

    contexts: number of contexts
    tokens: mean length, tokens
    average: mean score
    gap: best minus worst depth
    null_gap: what no effect of depth would give
    p_value: how likely so large a gap is then
    floor: score of who answers without reading
    normalised: average above the floor, as a share of what is above it
    strict: share of answers that are right word for word
    answer_nats_per_token: loss of the answers, nats a token
    nats_gap: worst minus best depth of that loss, nats a token
    nats_null_gap: what no effect of depth would give
    nats_p_value: how likely so large a gap is then
    depths: mean depths of the questions, as shares of the context
    scores: mean score at each depth
    strict_scores: share of answers that are right word for word, at each depth
    nats: loss of the answers at each depth, nats a token
    film: as FILM scores it, where FILM has this probe
    """

    contexts: int
    tokens: float
    average: Interval
    gap: Interval
    null_gap: NullGap
    p_value: float
    floor: float
    normalised: float
    strict: Interval
    answer_nats_per_token: Interval
    nats_gap: Interval
    nats_null_gap: NullGap
    nats_p_value: float
    depths: list[float]
    scores: list[float]
    strict_scores: list[float]
    nats: list[float]
    film: FilmScore | None = absent()


@dataclass(frozen=True)
class Depths(Part):
    """A probe of long contexts.

    pattern: the pattern of questions
    pieces: where the pieces of the contexts come from
    lengths: by the length of the contexts in tokens
    trained_on: whether the model's recipe says that it was trained on the pattern
    """

    pattern: str
    pieces: str
    lengths: dict[str, DepthRow]
    trained_on: bool


@dataclass(frozen=True)
class Split(Part):
    """Items of a synthetic task of one kind of length.

    accuracy: share of right answers
    nats_per_answer: loss, nats an answer
    commonest_answer: share of the commonest answer
    answers: number of answers
    items: number of items
    tokens: number of tokens
    """

    accuracy: Interval
    nats_per_answer: Interval
    commonest_answer: float
    answers: int
    items: int
    tokens: int


@dataclass(frozen=True)
class SyntheticTask(Part):
    """A synthetic task with exact answers.

    size: size of its items in distribution
    unit: what that is counted in
    splits: by the kind of length
    """

    size: int
    unit: str
    splits: dict[str, Split]


ProbeSummary = Needle | Depths | Position | SyntheticTask  # what a probe may find


@dataclass(frozen=True)
class TaskScores(Part):
    """A task of lm-evaluation-harness.

    harness: version of the harness
    task: its name there
    length: tokens of its texts, for RULER's
    version: version of the task
    few_shot: examples in a prompt
    documents: number of documents
    metrics: what the task measures, by name
    """

    harness: str
    task: str
    length: int | None
    version: Any
    few_shot: int | None
    documents: int
    metrics: dict[str, Interval]


@dataclass(frozen=True)
class Subject(Part):
    """One of the models.

    name: folder or hub id that was given
    revision: branch, tag or commit of a hub model
    path: the folder that was read
    model_type: its type in transformers
    dtype: type that it ran in
    parameters: number of weights
    loss: what the text costs it
    cache: its cache; None where it has none
    probes: what each probe found, by name; None without any
    tasks: what it scored in each task, by label; None without any
    """

    name: str
    revision: str | None
    path: str | None
    model_type: str
    dtype: str
    parameters: int
    loss: Loss
    cache: CacheGrowth | None
    probes: dict[str, ProbeSummary] | None
    tasks: dict[str, TaskScores] | None


@dataclass(frozen=True)
class Difference(Part):
    """The loss of MODEL minus that of the other, paired by window: above 0 means that MODEL is worse.

    unit: what is compared: nats per token where both have the same tokens, else bits per byte
    bits_per_byte: in bits a byte of text
    nats_per_token: in nats a token, where both have the same tokens
    perplexity_ratio: of the perplexities, where both have the same tokens
    """

    unit: str
    bits_per_byte: Interval
    nats_per_token: Interval | None = absent()
    perplexity_ratio: Interval | None = absent()


@dataclass(frozen=True)
class Ablation(Part):
    """The loss of MODEL without a part, minus its loss as it is, paired by window.

    unit: nats per token
    bits_per_byte: in bits a byte of text
    nats_per_token: in nats a token
    perplexity_ratio: of the perplexities
    part: what it did without
    """

    unit: str
    bits_per_byte: Interval
    nats_per_token: Interval
    perplexity_ratio: Interval
    part: str


@dataclass(frozen=True)
class Spread(Part):
    """Several timings.

    median: the middle one
    low: the lowest
    high: the highest
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing(Part):
    """One model at one length of context.

    prefill_tokens_per_s: rate of reading, tokens a second
    decode_tokens_per_s: rate of writing, tokens a second
    cache_bytes: size of the cache in between, bytes
    """

    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    cache_bytes: int


@dataclass(frozen=True)
class Ratio(Part):
    """Rates of MODEL over those of the other, of timings right after each other.

    prefill: of reading
    decode: of writing
    """

    prefill: Spread
    decode: Spread


@dataclass(frozen=True)
class SpeedRow(Part):
    """Timings at one length of context.

    context: that length, tokens
    model: MODEL
    against: the other model
    ratio: of their rates
    """

    context: int
    model: Timing
    against: Timing | None = absent()
    ratio: Ratio | None = absent()


@dataclass(frozen=True)
class Speed(Part):
    """Prefill and decode, timed with the cache.

    batch: sequences at once
    steps: tokens decoded in one timing
    repeats: timings of each kind
    rows: one for each length of context
    """

    batch: int
    steps: int
    repeats: int
    rows: list[SpeedRow]


@dataclass(frozen=True)
class Text(Part):
    """The text that was measured on.

    source: files and folders, or python: the sources of this Python
    documents: number of documents
    windows: number of windows
    length: length of a window, tokens
    tokens: number of tokens
    sha256: of the text of all windows
    """

    source: str | list[str]
    documents: int
    windows: int
    length: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Hardware(Part):
    """What was measured on.

    device: device of torch
    machine: kind of processor
    cores: number of cores
    torch_threads: threads of torch
    memory_bytes: memory, bytes
    accelerator: name of the accelerator, if any
    accelerator_memory_bytes: its memory, bytes
    """

    device: str
    machine: str
    cores: int
    torch_threads: int
    memory_bytes: int
    accelerator: str | None = absent()
    accelerator_memory_bytes: int | None = absent()
