"""The verbs as functions, for notebooks and scripts: plain values in, an object out whose text is the command line's table.

    from upfit import api

    small = api.convert("org/model", "small", to="gqa", kv_heads=2)
    small.kv_bytes_per_token          # [before, after]
    small.record()                    # the dictionary of `upfit convert gqa --json`

A path is text or a Path, `texts` is one of them or a list; counts of tokens are numbers or text such as "50M". What a user can
put right raises UpfitError. With `progress=False` nothing is printed. Importing this imports no torch: each function does.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from upfit.evaluate.options import Options as EvaluateOptions
from upfit.longcontext.options import Options as SynthOptions
from upfit.options import as_kind, from_keywords, parse_size
from upfit.output import Output
from upfit.plan.options import Options as PlanOptions
from upfit.publish.options import Options as PushOptions
from upfit.text.files import FIELD
from upfit.uptrain.config import Config as UptrainConfig

if TYPE_CHECKING:
    from upfit.calibration.result import Calibration
    from upfit.convert.result import Conversion, Description
    from upfit.evaluate.result import Evaluation
    from upfit.longcontext.result import Synthesis
    from upfit.plan.result import TrainingCost
    from upfit.publish.result import Publication, Publications
    from upfit.report.result import Comparison, Report
    from upfit.uptrain.data.result import Preparation
    from upfit.uptrain.run.result import Uptraining

__all__ = [
    *("calibrate", "compare", "convert", "describe", "evaluate", "merge"),
    *("plan", "prepare", "push", "report", "synth", "uptrain"),
]

Place = str | Path
Texts = str | Path | Sequence[str | Path]
Count = int | str
Function = TypeVar("Function", bound=Callable[..., Any])


def _takes(settings: type) -> Callable[[Function], Function]:
    """Shows the fields of an options dataclass as keywords of a function, in its signature and its docstring."""

    def showing(function: Function) -> Function:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        lines = []
        for field in dataclasses.fields(settings):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default))
            lines.append(f"    {field.name}: {field.metadata['help']}")
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__doc__ = f"{function.__doc__}\n\n    Settings:\n    " + "\n    ".join(lines)
        return function

    return showing


def convert(
    model: Place,
    out: Place,
    *,
    to: str,
    dry_run: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    max_shard_size: Count | None = None,
    verify: bool = True,
    verify_bytes: bool = True,
    stream: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> "Conversion":
    """Convert a checkpoint to another attention: `to` is gqa, mqa, diff, cope or whatever `upfit list` names.

    `options` are those of the attention, such as `kv_heads=4` (`upfit convert gqa --help` tells them); the others are of every
    conversion. `model` is a folder or hub id (`id@revision`), `out` the folder to write.

    dry_run: tell what would be written, and write nothing
    dtype: type of all weights (float32, bfloat16, float16); default: kept
    revision: branch, tag or commit of a hub model
    max_shard_size: largest file, such as "5GB" or a number of bytes; default: as the source
    verify, verify_bytes: check the result, and read back what was written
    stream: fetch a hub model's files one at a time, and drop each when it is done with
    overwrite: replace an output that Upfit wrote
    """
    from upfit.convert.conversion import Settings
    from upfit.convert.conversion import convert as run
    from upfit.convert.recipe import get_recipe

    recipe = get_recipe(to)
    values = from_keywords(recipe.options, options, f"api.convert to {to!r}", _keywords(convert))
    settings = Settings(dry_run, dtype, revision, _shard_bytes(max_shard_size), verify, overwrite, stream, verify_bytes)
    return run(recipe, str(model), Path(out), recipe.options(**values), settings, Output(quiet=not progress))


def merge(
    model: Place,
    out: Place,
    *,
    dry_run: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    max_shard_size: Count | None = None,
    verify: bool = True,
    verify_bytes: bool = True,
    stream: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> "Conversion":
    """Fold what a conversion added and training has learned into the stock class; keywords as those of `convert`."""
    from upfit.convert.conversion import Settings
    from upfit.convert.conversion import merge as run

    settings = Settings(dry_run, dtype, revision, _shard_bytes(max_shard_size), verify, overwrite, stream, verify_bytes)
    return run(str(model), Path(out), settings, Output(quiet=not progress))


def calibrate(
    model: Place,
    texts: Texts,
    out: Place,
    *,
    field: str = FIELD,
    calibration_tokens: Count = "64k",
    calibration_length: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> "Calibration":
    """Watch a model read text, and keep statistics of every attention layer in the file `out`, NAME.safetensors.

    field: field of JSON and parquet that holds the text
    calibration_tokens: tokens of text to use
    calibration_length: tokens of a window: the length to be served; default: 2048, or what the model allows
    """
    from upfit.calibration.calibrate import calibrate as run

    tokens, length, output = str(calibration_tokens), calibration_length, Output(quiet=not progress)
    return run(str(model), _texts(texts), Path(out), tokens, length, revision, overwrite, output, field)


def prepare(
    texts: Texts,
    out: Place,
    *,
    tokenizer: Place,
    field: str = FIELD,
    tokens: Count | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> "Preparation":
    """Turn text into token shards for uptraining, in the folder `out`.

    texts: files, folders, or a hub data set id
    tokenizer: model whose tokenizer is used
    field: field of JSON and parquet that holds the text
    tokens: stop after so many; default: all
    workers: batches tokenised at a time; default: as many as cores
    """
    from upfit.uptrain.data.prepare import prepare as run

    limit, output = None if tokens is None else str(tokens), Output(quiet=not progress)
    return run(_texts(texts), Path(out), str(tokenizer), field, output, overwrite, limit, workers)


@_takes(SynthOptions)
def synth(texts: Texts, out: Place, *, progress: bool = True, **settings: Any) -> "Synthesis":
    """Write long-context training data to the folder `out`: questions whose answers stand anywhere in 4k to 32k tokens."""
    from upfit.longcontext.synth import synth as run

    options = SynthOptions(**from_keywords(SynthOptions, settings, "api.synth", ["progress"]))
    return run(_texts(texts), Path(out), options, Output(quiet=not progress))


@_takes(PlanOptions)
def plan(model: Place, *, revision: str | None = None, **settings: Any) -> "TrainingCost":
    """FLOPs, memory and GPU-hours of an uptraining, before anything runs."""
    from upfit.plan.plan import plan as run

    options = PlanOptions(**from_keywords(PlanOptions, settings, "api.plan", ["revision"]))
    return run(str(model), options, revision)


@_takes(UptrainConfig)
def uptrain(
    model: Place,
    data: Place,
    out: Place,
    *,
    config: Place | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> "Uptraining":
    """Train a converted model to be good again, with its former self as teacher, and write it to `out`.

    data: text of `prepare` (several: code=0.7,prose=0.3) or questions of `synth`
    config: TOML file with settings; those that are given here go first
    resume: go on from the newest checkpoint of `out`
    """
    from upfit.uptrain.config import resolve, tables

    values = from_keywords(UptrainConfig, settings, "api.uptrain", _keywords(uptrain))
    file = None if config is None else Path(config)
    resolved, output = resolve(file, values), Output(quiet=not progress)
    from upfit.uptrain.train import uptrain as run  # imports torch: what is wrong with settings is told before

    return run(str(model), str(data), Path(out), resolved, resume, overwrite, output, tables(file))


@_takes(EvaluateOptions)
def evaluate(model: Place, *, progress: bool = True, **settings: Any) -> "Evaluation":
    """Loss and perplexity with intervals, KV-cache bytes and speed; with `against` also of another model on the same text."""
    from upfit.evaluate.evaluate import evaluate as run

    options = EvaluateOptions(**from_keywords(EvaluateOptions, settings, "api.evaluate", ["progress"]))
    return run(str(model), options, Output(quiet=not progress))


def report(
    model: Place,
    out: Place | None = None,
    *,
    results: Texts = (),
    png: Place | None = None,
    overwrite: bool = False,
) -> "Report":
    """Write the story of a folder as one HTML file: what was done, measured and predicted, in tables and plots.

    out: page to write; default: the model's name
    results: answers kept from `evaluate --json` or `convert --dry-run --json`
    png: folder to write each plot to as PNG
    """
    from upfit.report.run import report as run

    page, pictures = None if out is None else Path(out), None if png is None else Path(png)
    return run(str(model), page, [Path(file) for file in _texts(results)], pictures, overwrite)


def compare(models: Texts) -> "Comparison":
    """Several models in one table: size, cache, and the losses that `evaluate(..., record=True)` kept in them."""
    from upfit.report.compare import compare as run

    return run(_texts(models))


@_takes(PushOptions)
def push(
    model: Place, repo: str, *, ask: Callable[[str], bool] | None = None, progress: bool = True, **settings: Any
) -> "Publication | Publications":
    """Publish a folder on the hub, with a model card made from its recipe.json; with `all` several, as Publications.

    ask: takes a question and says whether to go on; without it every doubt ends the push, unless `yes` is given
    """
    from upfit.publish.push import push as run
    from upfit.publish.result import Publications

    options = PushOptions(**from_keywords(PushOptions, settings, "api.push", ["ask", "progress"]))
    answers = run(str(model), repo, options, ask, Output(quiet=not progress))
    return Publications(answers) if options.all else answers[0]


def describe(model: Place, *, revision: str | None = None) -> "Description":
    """Architecture, heads, parameters, KV bytes a token, history, and what the model can become."""
    from upfit.convert.describe import describe as run

    return run(str(model), revision)


def _shard_bytes(size: Count | None) -> int | None:
    return None if size is None else parse_size(size, "--max-shard-size")


def _texts(texts: Texts) -> list[str]:
    paths: list[str] = as_kind(texts, list[str])
    return paths


def _keywords(function: Callable[..., Any]) -> list[str]:
    """The keywords that a function has beside its settings."""
    return list(function.__kwdefaults__ or ())
