"""`upfit evaluate` of an encoder-decoder, or of a model that is shown images: show it examples, measure, compare."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from upfit.checkpoint.reader import read_config
from upfit.checkpoint.source import Source, find_source
from upfit.errors import UpfitError
from upfit.evaluate import measures
from upfit.evaluate.encoder_decoder import words
from upfit.evaluate.encoder_decoder.caches import measure_caches
from upfit.evaluate.encoder_decoder.losses import example_losses
from upfit.evaluate.encoder_decoder.words import Heard, check_jiwer, listen
from upfit.evaluate.load import free, is_encoder_decoder, load_encoder_decoder
from upfit.evaluate.loss import Losses, difference
from upfit.evaluate.options import Options
from upfit.evaluate.record import finished
from upfit.evaluate.result import Evaluation
from upfit.evaluate.speed import hardware
from upfit.examples import Examples, Kind, kind_of, read_examples
from upfit.examples.images import all_images, read_images
from upfit.examples.kinds import sees
from upfit.examples.model_inputs import padding_of
from upfit.options import field_of
from upfit.output import Output
from upfit.text import python_documents
from upfit.text.files import has_metadata
from upfit.text.tokenizer import load_tokenizer

ExampleKind = Kind | Literal["images"]
DECODERS_ONLY = ("length", "speed", "probe", "ablate", "tasks")


@dataclass(frozen=True)
class Shown:
    """One of the models, and the examples in its own tokens."""

    source: Source
    config: dict[str, Any]
    tokenizer: Any
    examples: Examples


@dataclass(frozen=True)
class Measured:
    dtype: str
    parameters: int
    losses: Losses
    cache: measures.CacheGrowth | None
    cross_cache: measures.CrossCache | None
    heard: Heard | None


def evaluate(source: Source, options: Options, device: torch.device, command: str, output: Output) -> Evaluation:
    """Measure the encoder-decoder, or the model that sees, in `source`, and with `options.against` a second one on the same
    examples.

    Raises UpfitError for options that are of decoders alone, and for models or data that cannot be measured like this.
    """
    _check_options(source, options)
    kind = _kind_of(source)
    if kind == "sound":
        check_jiwer()
    shown = [_shown(source, options, output)]
    if options.against is not None:
        shown.append(_shown(_other(options.against, kind), options, output))
        _check_same_texts(shown)
    measured = [_measure(one, kind, options, device, output) for one in shown]
    if len({one.dtype for one in measured}) > 1:
        output.note(f"the models run in {' and '.join(one.dtype for one in measured)}; give --dtype to compare in one type")
    subjects = [_summary(*pair) for pair in zip(shown, measured, strict=True)]
    result = Evaluation(
        model=subjects[0],
        against=subjects[1] if len(subjects) > 1 else None,
        difference=difference(measured[0].losses, measured[1].losses, _same_tokens(shown)) if len(shown) > 1 else None,
        probe_differences=None,
        task_differences=None,
        ablation=None,
        speed=None,
        data=_described(shown[0].examples, options),
        hardware=hardware(device),
        command=command,
        options={},
        versions={},
        date="",
        word_error_difference=_word_difference([one.heard for one in measured]),
    )
    return finished(result, source, shown[1].source if len(shown) > 1 else None, options, output)


def takes_examples(source: Source, options: Options) -> bool:
    """Whether it is measured on examples: an encoder-decoder, or a model that sees and is given images."""
    if is_encoder_decoder(source):
        return True
    described = any(map(has_metadata, options.data or ()))
    return described and sees(read_config(source.path)) and all_images(options.data, "--data")


def _kind_of(source: Source) -> ExampleKind:
    config = read_config(source.path)
    kind = kind_of(config)
    return "images" if kind == "text" and sees(config) else kind


def _check_options(source: Source, options: Options) -> None:
    for name in DECODERS_ONLY:
        if getattr(options, name) != field_of(Options, name).default:
            what = "decoders, and {} is an encoder-decoder" if is_encoder_decoder(source) else "text, and {} is shown images"
            raise UpfitError(f"--{name} is for {what.format(source.name)}; leave it out")


def _other(name: str, kind: ExampleKind) -> Source:
    source = find_source(name)
    other = _kind_of(source)
    if other != kind:
        takes = {"text": "text alone", "pairs": "pairs of texts", "sound": "sound", "images": "images with text"}
        raise UpfitError(f"--against {name} takes {takes[other]}, and the model {takes[kind]}; give one of the same kind")
    return source


def _shown(source: Source, options: Options, output: Output) -> Shown:
    config = read_config(source.path)
    if _kind_of(source) == "images":
        examples = read_images(source.path, config, options.data or [], "--data", options.field, None, options.windows, output)
    else:
        examples = read_examples(
            source.path, config, options.data, "--data", options.field, options.windows, output, python_documents
        )
    return Shown(source, config, load_tokenizer(str(source.path)), examples)


def _check_same_texts(shown: list[Shown]) -> None:
    """What is written has to be the same text, and with spans left out the same spans, to be compared."""
    first, second = (one.examples for one in shown)
    same = [example.text for example in first.examples] == [example.text for example in second.examples]
    if not same or (first.kind == "spans" and not _same_tokens(shown)):
        raise UpfitError(
            f"{shown[0].source.name} and {shown[1].source.name} would be shown different examples, for their tokenizers or "
            "sizes differ; give pairs of texts, or recordings, that both take whole"
        )


def _same_tokens(shown: list[Shown]) -> bool:
    first, second = (one.examples.examples for one in shown)
    return all(torch.equal(one.labels, other.labels) for one, other in zip(first, second, strict=True))


def _measure(shown: Shown, kind: ExampleKind, options: Options, device: torch.device, output: Output) -> Measured:
    model = load_encoder_decoder(shown.source, options.dtype, device)
    name, examples, pad = shown.source.name, shown.examples.examples, padding_of(shown.config)
    with output.progress(f"loss of {name}", len(examples)) as meter:
        losses = example_losses(model, examples, shown.tokenizer, pad, options.batch, name, meter)
    longest = max(examples, key=lambda example: len(example.keywords.get("input_ids", ())))
    caches = measure_caches(model, longest, pad)
    heard = None
    if kind == "sound":
        with output.progress(f"words of {name}", len(examples)) as meter:
            heard = listen(model, examples, shown.tokenizer, pad, options.batch, meter)
    measured = Measured(str(model.dtype).removeprefix("torch."), model.num_parameters(), losses, *caches, heard)
    del model
    free(device)
    return measured


def _summary(shown: Shown, measured: Measured) -> measures.Subject:
    return measures.Subject(
        **shown.source.record(),
        model_type=shown.config["model_type"],
        dtype=measured.dtype,
        parameters=measured.parameters,
        loss=measured.losses.summary(),
        cache=measured.cache,
        probes=None,
        tasks=None,
        cross_cache=measured.cross_cache,
        word_errors=measured.heard.summary() if measured.heard else None,
    )


def _word_difference(heard: list[Heard | None]) -> Any:
    return words.difference(heard[0], heard[1]) if len(heard) > 1 and heard[0] and heard[1] else None


def _described(examples: Examples, options: Options) -> measures.Text:
    shown = examples.examples
    return measures.Text(
        source=options.data or "python",
        documents=len({example.document for example in shown}),
        windows=len(shown),
        length=max(len(example.decoder_ids) for example in shown),
        tokens=sum(len(example.decoder_ids) for example in shown),
        sha256=examples.record["sha256"],
        examples=examples.kind,
    )
