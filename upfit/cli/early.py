"""What is told before torch is imported: paths, outputs and numbers that a command cannot do anything with.

Every check is one that the command's own room makes again: of what is right here, it alone knows the rest.
"""

from pathlib import Path
from typing import Any

from upfit.architecture.table import check_known, is_stock_latent
from upfit.checkpoint.output_folder import check_output, check_place, local_folder, resolved
from upfit.checkpoint.reader import read_config
from upfit.checkpoint.source import local_source
from upfit.convert.recipe import check_dtype
from upfit.errors import UpfitError
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.evaluate.options import check_data
from upfit.evaluate.options import check_options as check_measures
from upfit.longcontext.options import Options as SynthOptions
from upfit.options import parse_count, parse_share, parse_size
from upfit.plan.hardware import find_gpu
from upfit.plan.options import Options as PlanOptions
from upfit.plan.options import check_options
from upfit.text.files import FIELD, check_field, local_inputs, named_files
from upfit.uptrain.config import Config
from upfit.uptrain.config import check as check_config

STATISTICS = ".safetensors"  # what the name of a statistics file ends with


def check_model(name: str | Path | None) -> None:
    """Raise UpfitError for a model that is not here, is not one, or is of a type that is refused. Hub ids are not looked up."""
    source = None if name is None else local_source(str(name))
    if source is not None:
        check_known(read_config(source.path))


def check_used(name: str | Path | None) -> None:
    """As `check_model`; what caches a latent is shown, measured and trained, though nothing is made of it."""
    source = None if name is None else local_source(str(name))
    if source is not None and not is_stock_latent(config := read_config(source.path)):
        check_known(config)


def check_tokenizer(name: str) -> None:
    local_source(name)


def check_conversion(
    source: str, out: Path, flags: dict[str, Any], dtype: str | None, shard: str | None, overwrite: bool
) -> None:
    """The arguments of `convert` and `merge`."""
    check_model(source)
    check_dtype(dtype)
    if shard is not None:
        parse_size(shard, "--max-shard-size")
    check_calibration(flags.get("calibration"), flags.get("calibration_tokens"), flags.get("field", FIELD))
    check_output(out, local_folder(source), 0, overwrite)


def check_calibration(texts: list[str] | None, tokens: str | None, field: str) -> None:
    """Text to calibrate on, or one statistics file, how much of it, and where it is in JSON and parquet."""
    if tokens is not None:
        parse_count(tokens, "--calibration-tokens")
    if texts and any(name.endswith(STATISTICS) for name in texts):
        check_field([Path(name) for name in texts], field)
    elif texts:
        named_files(texts, "--calibration", field)


def check_statistics_output(out: Path, overwrite: bool) -> None:
    """The file that `calibrate` writes."""
    if out.suffix != STATISTICS:
        raise UpfitError(f"STATS {out} must end in {STATISTICS}, for that is what it is")
    check_file(out, overwrite)


def check_file(out: Path, overwrite: bool) -> None:
    """A file to write. Raises UpfitError where it is there, or cannot be made."""
    out = resolved(out)
    if out.exists() and not overwrite and not out.is_dir():
        raise UpfitError(f"{out} exists; choose another name or pass --overwrite")
    check_place(out, [], 0)


def check_page(out: Path | None, overwrite: bool) -> None:
    """The page that `report` writes."""
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UpfitError(f"OUT is {out}; give a name that ends in .html")
    if out is not None:
        check_file(out, overwrite)


def check_texts(texts: list[str], out: Path, tokenizer: str, overwrite: bool, field: str) -> None:
    """Text, and the folder that `prepare` and `synth` make of it."""
    local = local_inputs(texts, field)
    check_tokenizer(tokenizer)
    check_output(out, [*local, *local_folder(tokenizer)], 0, overwrite)


def check_synth(texts: list[str], out: Path, options: SynthOptions) -> None:
    check_texts(texts, out, options.tokenizer, False, options.field)
    local_inputs(options.decontaminate or [])


def check_plan(model: str, options: PlanOptions) -> None:
    check_options(options)
    find_gpu(options.gpu)
    check_budget(options.tokens, options.share, options.original_tokens)
    check_used(model)


def check_budget(tokens: str | None, share: str | None, original: str | None) -> None:
    """Counts of tokens, as text."""
    for text, flag in ((tokens, "--tokens"), (original, "--original-tokens")):
        if text is not None:
            parse_count(text, flag)
    if share is not None:
        parse_share(share, "--share")


def check_training(model: str, data: str, out: Path, config: Config, resume: bool, overwrite: bool) -> None:
    """The arguments of `uptrain`; with `resume` OUT may be finished, and DATA is no longer needed then."""
    from upfit.longcontext.contexts import CONTEXTS  # imports numpy
    from upfit.uptrain.data.sources import Sources

    check_config(config)
    check_budget(config.tokens, config.share, config.original_tokens)
    check_used(model)
    if resume:
        return
    check_output(out, local_folder(model), 0, overwrite)
    if not (Path(data).expanduser() / CONTEXTS).exists():  # no questions
        Sources.open(data)


def check_evaluation(model: str, options: EvaluateOptions) -> None:
    check_measures(options)
    check_data(options)
    check_used(model)
    check_used(options.against)


def check_new_folder(out: Path, overwrite: bool) -> None:
    """A folder of which its verb alone knows whether what is there may be replaced."""
    if not overwrite:
        check_output(out, [], 0, overwrite)


def check_published(model: Path) -> None:
    if not model.expanduser().is_dir():
        raise UpfitError(f"no folder at {model.expanduser()}; give the folder of a converted model")
