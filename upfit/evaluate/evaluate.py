"""`upfit evaluate`: load, measure, compare, and collect everything in an `Evaluation`, which prints itself."""

import shlex
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from upfit import provenance
from upfit.checkpoint.source import Source, find_source
from upfit.errors import UpfitError
from upfit.evaluate import measures
from upfit.evaluate.ablate import ablated
from upfit.evaluate.cache import measure_cache
from upfit.evaluate.encoder_decoder import evaluate as encoder_decoder
from upfit.evaluate.harness import harness
from upfit.evaluate.harness import scores as harness_scores
from upfit.evaluate.load import (
    check_model,
    free,
    is_encoder_decoder,
    load_config,
    load_model,
    load_tokenizer,
    most_positions,
    pick_device,
)
from upfit.evaluate.loss import Losses, difference, window_losses
from upfit.evaluate.options import Options, check_data, check_options
from upfit.evaluate.probes import attention_maps, needle
from upfit.evaluate.probes.registry import PROBES, make_samples
from upfit.evaluate.probes.summaries import Depths, Needle, ProbeSummary
from upfit.evaluate.record import check_recordable, finished
from upfit.evaluate.result import Evaluation
from upfit.evaluate.speed import hardware, measure_speed, settle_lengths
from upfit.options import as_flags
from upfit.output import Output
from upfit.text import Document, file_documents, python_documents
from upfit.text.windows import Window, digest, make_windows, retokenised, same_tokens

DEFAULT_LENGTH = 512
READ_BYTES = 4_000_000  # of text, at most, unless the windows asked for need more
BYTES_PER_TOKEN = 16  # read per token wanted: about four times what it takes, so that the choice is a choice
CAUSAL_TOKENS = 16


@dataclass
class Subject:
    """One of the models, with the windows in its own tokens, and what has been measured of it."""

    source: Source
    tokenizer: Any
    most: int | None
    windows: list[Window]
    model_type: str
    dtype: str = ""  # that it ran in
    parameters: int = 0
    ablate: str | None = None  # the part to do without, once
    losses: Losses | None = None
    ablated: Losses | None = None
    cache: measures.CacheGrowth | None = None
    samples: dict[str, list[Any]] = field(default_factory=dict)  # of each probe
    probed: dict[str, Any] = field(default_factory=dict)
    asked: list[harness.Asked] = field(default_factory=list)
    scores: dict[str, harness_scores.Scores] = field(default_factory=dict)
    short: needle.Sample | None = None  # the text whose attention maps are kept
    maps: list[torch.Tensor] = field(default_factory=list)  # of every layer on it [H, T, T]

    def ids(self) -> torch.Tensor:
        """The text of all windows, as one row of tokens [tokens]."""
        return torch.from_numpy(np.concatenate([window.ids for window in self.windows]))

    def summary(self) -> measures.Subject:
        return measures.Subject(
            **self.source.record(),
            model_type=self.model_type,
            dtype=self.dtype,
            parameters=self.parameters,
            loss=_losses(self).summary(),
            cache=self.cache,
            probes={name: self._probe(name) for name in self.probed} or None,
            tasks={label: scores.summary() for label, scores in self.scores.items()} or None,
        )

    def _probe(self, name: str) -> ProbeSummary:
        """What a probe found, and whether the model's recipe says that it was trained on the probe's pattern."""
        summary = PROBES[name].summary(self.probed[name], self.samples[name])
        if not isinstance(summary, Depths):
            return summary
        return replace(summary, trained_on=summary.pattern in provenance.patterns(self.source.path))


def evaluate(model: str, options: Options, output: Output) -> Evaluation:
    """Measure `model` (folder, hub id or id@revision), and with `options.against` a second one on the same text.

    What was not asked for is None. Progress goes to `output`.
    Raises UpfitError for whatever the user can mend: no tokenizer, no text, not a causal model, too long a window.
    """
    check_options(options)
    check_data(options)  # before a model is fetched
    device = pick_device(options.device)
    source = find_source(model, options.revision)
    if options.record:
        check_recordable(source)
    command = shlex.join(["upfit", "evaluate", model, *as_flags(options)])
    if encoder_decoder.takes_examples(source, options):
        return encoder_decoder.evaluate(source, options, device, command, output)
    subjects = [_subject(source)]
    subjects[0].ablate = options.ablate
    if options.against is not None:
        subjects.append(_subject(_decoder(find_source(options.against), source)))
    lengths = settle_lengths(options.speed_lengths, options.speed_steps, _least(subjects)) if options.speed else []
    same, data = _lay_windows(subjects, options, output)
    if options.tasks:
        asked = harness.load(options, subjects[0].tokenizer, _least(subjects), output)
        for subject in subjects:
            subject.asked = asked
    speed = _measure(subjects, options, lengths, device, output)
    first, second = subjects[0], subjects[1] if len(subjects) > 1 else None
    summaries = [subject.summary() for subject in subjects]
    if "needle" in first.probed:
        summaries = _number_heads(subjects, summaries, options.attention_maps)
    if second and first.dtype != second.dtype:
        output.note(f"the models run in {first.dtype} and {second.dtype}; give --dtype to compare in one type")
    result = Evaluation(
        model=summaries[0],
        against=summaries[1] if second else None,
        difference=difference(_losses(first), _losses(second), same) if second else None,
        probe_differences={name: PROBES[name].compared(first.probed[name], second.probed[name]) for name in first.probed}
        if second and first.probed
        else None,
        task_differences=harness_scores.differences(first.scores, second.scores) if second and first.scores else None,
        ablation=_ablation(first),
        speed=speed,
        data=data,
        hardware=hardware(device),
        command=command,
        options={},
        versions={},
        date="",
    )
    return finished(result, source, second.source if second else None, options, output)


def _ablation(subject: Subject) -> measures.Ablation | None:
    if subject.ablated is None or subject.ablate is None:
        return None
    return measures.Ablation(**vars(difference(subject.ablated, _losses(subject), True)), part=subject.ablate)


def _number_heads(subjects: list[Subject], summaries: list[measures.Subject], count: int) -> list[measures.Subject]:
    """The summaries with the needle's heads numbered as in the source, and with the maps of the `count` that look at the answer
    most there (in the last of the subjects), the same heads of every model."""
    numbered = [_numbered(subject, summary) for subject, summary in zip(subjects, summaries, strict=True)]
    watched = [by_head for by_head, _ in numbered if by_head]
    heads = attention_maps.choose(watched[-1], count) if watched else []
    shown = []
    for subject, summary, (by_head, places) in zip(subjects, summaries, numbered, strict=True):
        maps = None
        if by_head and subject.short is not None:
            maps = needle.record_shown(subject.short, subject.tokenizer)
            maps |= {"heads": attention_maps.record_maps(subject.maps, heads, places)}
        shown.append(_with_needle(summary, attention_by_head=by_head, maps=maps) if by_head else summary)
    return shown


def _numbered(subject: Subject, summary: measures.Subject) -> tuple[list[list[float]], list[list[int]]]:
    """Attention on the needle's answer, and where each head is now, [layer][head of the source]; empty without any."""
    by_head = _needle(summary).attention_by_head or []
    places = attention_maps.places(provenance.read(subject.source.path), by_head)
    return [[layer[at] for at in heads] for layer, heads in zip(by_head, places, strict=True)], places


def _needle(summary: measures.Subject) -> Needle:
    needle = (summary.probes or {})["needle"]
    assert isinstance(needle, Needle)
    return needle


def _with_needle(summary: measures.Subject, **changes: Any) -> measures.Subject:
    return replace(summary, probes={**(summary.probes or {}), "needle": replace(_needle(summary), **changes)})


def _decoder(source: Source, model: Source) -> Source:
    if is_encoder_decoder(source):
        raise UpfitError(
            f"--against {source.name} is an encoder-decoder, and {model.name} a decoder; give one of the same kind"
        )
    return source


def _subject(source: Source) -> Subject:
    config = load_config(source)
    return Subject(source, load_tokenizer(source), most_positions(config), [], config.model_type)


def _least(subjects: list[Subject]) -> int | None:
    """The positions that all of the models take."""
    return min((subject.most for subject in subjects if subject.most is not None), default=None)


def _losses(subject: Subject) -> Losses:
    assert subject.losses is not None
    return subject.losses


def _lay_windows(subjects: list[Subject], options: Options, output: Output) -> tuple[bool, measures.Text]:
    """Give every subject the same text as windows. Returns whether the tokens are the same, and what the text was."""
    least, length = _least(subjects), options.length
    if length is None:
        length = min(DEFAULT_LENGTH, least or DEFAULT_LENGTH)
    elif least is not None and length > least:
        raise UpfitError(f"--length {length} is more than the {least} positions the model takes; give at most {least}")
    documents = _documents(options, length, output)
    first = subjects[0]
    first.windows = make_windows(documents, first.tokenizer, length, options.windows)
    same = all(same_tokens(first.windows, first.tokenizer, other.tokenizer) for other in subjects[1:])
    for other in subjects[1:]:
        other.windows = first.windows if same else retokenised(first.windows, other.tokenizer)
        longest = max(len(window.ids) for window in other.windows)
        if other.most is not None and longest > other.most:
            raise UpfitError(
                f"a window of {length} tokens is {longest} tokens for {other.source.name}, which takes {other.most}; "
                "give a smaller --length"
            )
    if not same:
        output.note("the two tokenizers differ: losses per token are not comparable, the difference is in bits per byte")
    lengths = options.probe_length or [length]
    for name in options.probe or ():
        readers = [(subject.source.name, subject.tokenizer, subject.most) for subject in subjects]
        for subject, samples in zip(subjects, make_samples(name, readers, documents, options, lengths), strict=True):
            subject.samples[name] = samples
    for subject in subjects if options.attention_maps else ():
        subject.short = needle.short_sample(documents, subject.tokenizer, max(lengths))
    return same, _describe(first.windows, options, length)


def _documents(options: Options, length: int, output: Output) -> list[Document]:
    if options.data:
        budget = max(READ_BYTES, BYTES_PER_TOKEN * length * options.windows)
        return file_documents(options.data, budget, output=output, field=options.field)
    output.note(
        "no --data: measuring on the reference and library sources of this Python, half prose and half code; "
        "a model may have seen them in training"
    )
    return python_documents()


def _describe(windows: list[Window], options: Options, length: int) -> measures.Text:
    return measures.Text(
        source=options.data or "python",
        documents=len({window.document for window in windows}),
        windows=len(windows),
        length=length,
        tokens=sum(len(window.ids) for window in windows),
        sha256=digest(windows),
    )


def _measure(
    subjects: list[Subject], options: Options, lengths: list[int], device: torch.device, output: Output
) -> measures.Speed | None:
    """Losses and caches into the subjects, and the timings returned. Two models are in memory only while they take turns."""
    if not options.speed:
        for subject in subjects:
            _measure_one(subject, load_model(subject.source, options.dtype, device), options, output)
            free(device)
        return None
    models = [load_model(subject.source, options.dtype, device) for subject in subjects]
    for subject, model in zip(subjects, models, strict=True):
        _measure_one(subject, model, options, output)
    texts = [(model, subject.ids()) for subject, model in zip(subjects, models, strict=True)]
    loaded = dict(zip(("model", "against"), texts, strict=False))
    total = (options.speed_repeats + 1) * len(models) * sum(length + options.speed_steps for length in lengths)
    with output.progress("speed", total) as meter:
        rows = measure_speed(loaded, lengths, options.speed_batch, options.speed_steps, options.speed_repeats, meter)
    return measures.Speed(options.speed_batch, options.speed_steps, options.speed_repeats, rows)


def _measure_one(subject: Subject, model: Any, options: Options, output: Output) -> None:
    name, ids = subject.source.name, subject.ids().to(model.device)
    subject.dtype, subject.parameters = str(model.dtype).removeprefix("torch."), model.num_parameters()
    check_model(model, ids[:CAUSAL_TOKENS], name)
    if subject.ablate is not None:
        with ablated(model, subject.ablate, name), output.progress(f"without {subject.ablate}", len(subject.windows)) as meter:
            subject.ablated = window_losses(model, subject.windows, options.batch, name, meter)
    with output.progress(f"loss of {name}", len(subject.windows)) as meter:
        subject.losses = window_losses(model, subject.windows, options.batch, name, meter)
    subject.cache = measure_cache(model, ids, subject.most)
    for probe, samples in subject.samples.items():
        with output.progress(f"{probe} of {name}", len(samples)) as meter:
            subject.probed[probe] = PROBES[probe].ask(model, samples, meter)
    if subject.asked:
        subject.scores = harness.ask(model, subject.tokenizer, subject.most, subject.asked, options, name, output)
    if subject.short is not None:
        subject.maps = attention_maps.all_maps(model, subject.short.ids)
