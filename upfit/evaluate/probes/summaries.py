"""What each kind of probe finds, as `upfit evaluate` answers it."""

from dataclasses import dataclass
from typing import Any

from upfit.evaluate.interval import Interval
from upfit.results import Part, absent


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
