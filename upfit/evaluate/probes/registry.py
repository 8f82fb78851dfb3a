"""The list of probes: how each makes its samples, how a model answers them, and how the answers are recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from upfit.errors import UpfitError
from upfit.evaluate.options import Options
from upfit.evaluate.probes import needle, position, retrieval, synthetic
from upfit.evaluate.probes.summaries import ProbeSummary
from upfit.longcontext.probes import contexts
from upfit.longcontext.probes.families import FAMILIES
from upfit.output import Meter
from upfit.text import Document


@dataclass(frozen=True)
class Probe:
    """One `--probe`. `make` (tokenizers, documents, options, lengths): samples for each tokenizer, each with its tokens `ids`;
    `ask`: what a model does with them; `summary`: what both tell; `compared`: a first model's minus a second's, as JSON
    can hold it."""

    make: Callable[[list[Any], list[Document], Options, list[int]], list[list[Any]]]
    ask: Callable[[Any, list[Any], Meter], Any]
    summary: Callable[[Any, list[Any]], ProbeSummary]
    compared: Callable[[Any, Any], dict[str, Any]]


def _needles(tokenizers: list[Any], documents: list[Document], options: Options, lengths: list[int]) -> list[list[Any]]:
    return [needle.make_samples(documents, tokenizer, options.probe_samples, lengths[0]) for tokenizer in tokenizers]


def _questions(name: str, tokenizers: list[Any], _: list[Document], options: Options, lengths: list[int]) -> list[list[Any]]:
    return synthetic.make_questions(name, tokenizers, options.probe_samples, lengths[0])


def _contexts(
    name: str, tokenizers: list[Any], documents: list[Document], options: Options, lengths: list[int]
) -> list[list[Any]]:
    folder = Path(options.probe_pieces).expanduser() if options.probe_pieces else None
    settings = contexts.Settings(options.probe_depths, options.probe_asked, options.probe_format, folder)
    count = -(-options.probe_samples // options.probe_depths)
    return contexts.make_contexts(name, tokenizers, documents, lengths, count, settings)


def _windows(tokenizers: list[Any], documents: list[Document], options: Options, lengths: list[int]) -> list[list[Any]]:
    return position.make_samples(tokenizers, documents, options.probe_samples, lengths)


PROBES = {name: Probe(partial(_contexts, name), retrieval.probe, retrieval.summary, retrieval.compared) for name in FAMILIES}
PROBES["position"] = Probe(_windows, position.probe, position.summary, position.compared)
PROBES["needle"] = Probe(_needles, needle.probe, needle.summary, needle.compared)
PROBES |= {
    name: Probe(partial(_questions, name), synthetic.probe, synthetic.summary, synthetic.compared) for name in synthetic.TASKS
}


def make_samples(
    name: str, readers: list[tuple[str, Any, int | None]], documents: list[Document], options: Options, lengths: list[int]
) -> list[list[Any]]:
    """The same samples of a probe for each reader: a model's name, its tokenizer and the positions that it takes.

    Raises UpfitError where a model has too few positions: nothing is ever cut.
    """
    least = min((most for _, _, most in readers if most is not None), default=None)
    if least is not None and max(lengths) > least:
        raise UpfitError(f"--probe-length {max(lengths)} is more than the {least} positions of the model; give at most {least}")
    samples_of_each = PROBES[name].make([tokenizer for _, tokenizer, _ in readers], documents, options, sorted(set(lengths)))
    for (model, _, most), samples in zip(readers, samples_of_each, strict=True):
        longest = max(len(sample.ids) for sample in samples)
        if most is not None and longest > most:
            raise UpfitError(
                f"a text of --probe {name} is {longest} tokens for {model}, which takes {most}; give a smaller --probe-length"
            )
    return samples_of_each
