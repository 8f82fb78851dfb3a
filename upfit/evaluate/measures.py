"""The parts of what `upfit evaluate` answers, but for what probes find (`probes/summaries.py`)."""

from dataclasses import dataclass
from typing import Any

from upfit.evaluate.interval import Interval
from upfit.evaluate.probes.summaries import ProbeSummary
from upfit.results import Part, absent


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
class CrossCache(Part):
    """Cache of what the decoder's cross-attention reads: filled once, from the encoder.

    bytes_per_position: bytes for each position of the encoder
    positions: positions of the encoder that it was measured on
    bytes: size for that many, bytes
    """

    bytes_per_position: float
    positions: int
    bytes: int


@dataclass(frozen=True)
class WordErrors(Part):
    """What a model that hears writes of recordings (greedily), in words, without case and punctuation.

    rate: wrong words over words of the transcripts
    words: words of the transcripts
    substituted: words written for others
    missing: words that were not written
    added: words that nobody said
    recordings: number of recordings
    """

    rate: Interval
    words: int
    substituted: int
    missing: int
    added: int
    recordings: int


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
    cross_cache: the cache of its cross-attention; None where it has no encoder
    word_errors: what it wrote of recordings; None where it does not hear
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
    cross_cache: CrossCache | None = absent()
    word_errors: WordErrors | None = absent()


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
    windows: number of windows, or of examples
    length: length of a window, or of what the decoder reads at most, tokens
    tokens: number of tokens
    sha256: of the text of all windows, or of all that the model was shown
    examples: what an encoder-decoder, or a model that sees, was shown: text pairs, spans, sound or images
    """

    source: str | list[str]
    documents: int
    windows: int
    length: int
    tokens: int
    sha256: str
    examples: str | None = absent()


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
