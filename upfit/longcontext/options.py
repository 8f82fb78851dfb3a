"""The settings of `upfit synth`, one field a flag. Imports no torch, so that `--help` stays fast."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from upfit.errors import UpfitError
from upfit.options import check, option
from upfit.text.files import FIELD, FIELD_HELP

Ask = Literal["template", "dataset", "openai", "hf", "file"]
MODELS = ("openai", "hf", "file")
Export = Literal["none", "trl", "messages", "film"]
SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Options:
    """What to ask, of what text, in contexts of what length."""

    tokenizer: str = option(help="model whose tokenizer is used: folder or hub id")
    items: int = option(10_000, at_least=1, help="how many examples")
    ask: Ask = option("template", help="where questions come from: rules, question sets, or a language model")
    questions: list[str] | None = option(None, goes_with=("ask", "dataset"), help="files shaped like SQuAD or HotpotQA")
    families: list[str] | None = option(
        None, goes_with=("ask", "template"), help="families of questions, in turn; default: all"
    )
    model: str | None = option(
        None, goes_with=("ask", *MODELS), help="the model that asks: its name there, or a folder or hub id"
    )
    base_url: str | None = option(
        None, goes_with=("ask", "openai"), help="an OpenAI-compatible server, such as http://localhost:8000/v1"
    )
    responses: list[str] | None = option(
        None, goes_with=("ask", "file"), help="what a batch service answered to OUT.upfit-work/requests-*"
    )
    concurrency: int = option(8, at_least=1, help="with --ask openai: requests at a time")
    budget_tokens: int | None = option(
        None, at_least=1, goes_with=("ask", "openai"), help="stop asking after so many tokens, prompts counted"
    )
    temperature: float = option(0.7, at_least=0, help="temperature of a model's questions")
    several_share: float = option(0.2, at_least=0, at_most=1, help="share of a model's questions that need several segments")
    min_tokens: int = option(4096, at_least=64, help="tokens of the shortest example")
    max_tokens: int = option(32768, help="tokens of the longest example; lengths are spread evenly between")
    segment_tokens: int = option(128, at_least=8, help="tokens of a segment, at least")
    short_share: float = option(
        0.1, at_least=0, at_most=1, help="share of the questions that are asked of their own text alone"
    )
    format: Literal["plain", "chat"] = option("plain", help="words around the context: plain, or the tokenizer's chat template")
    decontaminate: list[str] | None = option(None, help="text to be tested on: what shares ten words in a row is left out")
    field: str = option(FIELD, help=FIELD_HELP)
    seed: int = option(0, help="seed of all that is drawn")
    shard: str = option("0/1", help="this process's part, such as 2/8; all parts share OUT, the last one puts them together")
    export: Export = option("none", help="also write the examples as text: for TRL, as messages, or as FILM's fields")


def check_options(options: Options) -> tuple[int, int]:
    """The shard as numbers. Raises UpfitError for a setting that is out of its range or goes with another."""
    check(options)
    if options.max_tokens < options.min_tokens:
        raise UpfitError(f"--max-tokens got {options.max_tokens}; give --min-tokens or more")
    for flag, value, asks in (("--model", options.model, MODELS), ("--questions", options.questions, ("dataset",))):
        if value is None and options.ask in asks:
            raise UpfitError(f"--ask {options.ask} needs {flag}; see docs/synth.md")
    for flag, names in (("--questions", options.questions), ("--responses", options.responses)):
        for name in names or ():
            if not Path(name).expanduser().is_file():
                raise UpfitError(f"{flag} {name} is not here; give files")
    part = SHARD.fullmatch(options.shard)
    if not part or not int(part[1]) < int(part[2]):
        raise UpfitError(f"--shard got {options.shard!r}; give I/N with I from 0 to N - 1, such as 2/8")
    return int(part[1]), int(part[2])
