"""`upfit prepare`, `synth`, `plan` and `uptrain`: data, what training costs, and training."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from upfit import api, provenance
from upfit.cli import early
from upfit.cli.base import TRAIN, Field, Json, Overwrite, Quiet, Revision, app, show_result, with_flags
from upfit.longcontext.options import Options as SynthOptions
from upfit.output import Output, human_count
from upfit.plan.options import Options as PlanOptions
from upfit.text.files import FIELD
from upfit.uptrain.config import Config as UptrainConfig
from upfit.uptrain.config import resolve


@app.command(rich_help_panel=TRAIN)
def prepare(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Files, folders, or a hub data set id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; work lies in OUT.upfit-work until it is whole.")],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer is used: folder or hub id.")],
    field: Field = FIELD,
    tokens: Annotated[str | None, typer.Option(help="Stop after so many tokens, such as 100M; default: all.")] = None,
    workers: Annotated[int | None, typer.Option(help="Batches tokenised at a time; default: as many as cores.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn text into token shards for uptraining (txt, jsonl, json, parquet, gz of them, hub data set)."""
    early.check_texts(texts, out, tokenizer, overwrite, field)
    output = Output(as_json, quiet)
    answer = api.prepare(
        texts,
        out,
        tokenizer=tokenizer,
        field=field,
        tokens=tokens,
        workers=workers,
        overwrite=overwrite,
        progress=not quiet,
    )
    show_result(answer, output)
    output.note(f"Next: upfit uptrain MODEL {out} OUT --tokens {human_count(answer.tokens).replace(' ', '')}")


def _synth(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Files, folders, or a hub data set id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; work lies in OUT.upfit-work until it is whole.")],
    flags: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Long-context training data: questions whose answers stand anywhere in 4k to 32k tokens (IN2)."""
    early.check_synth(texts, out, SynthOptions(**flags))
    show_result(api.synth(texts, out, progress=not quiet, **flags), Output(as_json, quiet))


app.command("synth", rich_help_panel=TRAIN)(with_flags(_synth, SynthOptions, "synth"))


def _plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to train: folder or hub id.")],
    flags: dict[str, Any],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """FLOPs, memory and GPU-hours of an uptraining, before anything runs."""
    early.check_plan(model, PlanOptions(**flags))
    show_result(api.plan(model, revision=revision, **flags), Output(as_json))


app.command("plan", rich_help_panel=TRAIN)(with_flags(_plan, PlanOptions, "plan"))


def _uptrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to train: folder or hub id.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Text of `upfit prepare` (several: code=0.7,prose=0.3) or questions of `upfit synth`."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; checkpoints go to OUT.upfit-work.")],
    flags: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with these and more settings (docs/uptrain-settings.md); flags go first."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of OUT.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted model to be good again, with its former self as teacher."""
    settings = {name: value for name, value in flags.items() if value is not None}
    early.check_training(model, data, out, resolve(config, settings), resume, overwrite)
    answer = api.uptrain(model, data, out, config=config, resume=resume, overwrite=overwrite, progress=not quiet, **settings)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process comes here, one tells
        output = Output(as_json, quiet)
        show_result(answer, output)
        if not answer.stopped:
            output.note(f"Next: upfit evaluate {shlex.quote(str(out))} --against {shlex.quote(source_of(out))}")


def source_of(out: Path) -> str:
    """The model that the one in `out` was converted from, as a command names it; SOURCE where its history tells of none."""
    source = provenance.teacher(out.expanduser())
    if source is None:
        return "SOURCE"
    name, path = source["name"], source.get("path")
    if path and Path(path).is_dir() and not source["revision"]:
        return name if Path(name).expanduser().is_dir() else path  # it may have been named from another folder
    return f"{name}@{source['revision']}" if source["revision"] else name


app.command("uptrain", rich_help_panel=TRAIN)(with_flags(_uptrain, UptrainConfig, "uptrain", unset=True))
