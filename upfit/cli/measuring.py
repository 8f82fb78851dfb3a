"""`upfit evaluate`, `report`, `compare` and `push`: measuring a model, and showing or publishing the result."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from upfit import api
from upfit.cli import early
from upfit.cli.base import MEASURE, Json, Quiet, app, show_result, with_flags
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.output import Output
from upfit.publish.options import Options as PushOptions


def _evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    flags: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Loss and perplexity with intervals, KV-cache bytes and speed; against another model on the same text."""
    early.check_evaluation(model, EvaluateOptions(**flags))
    show_result(api.evaluate(model, progress=not quiet, **flags), Output(as_json, quiet))


app.command("evaluate", rich_help_panel=MEASURE)(with_flags(_evaluate, EvaluateOptions, "evaluate"))


@app.command(rich_help_panel=MEASURE)
def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT.html", help="Page to write; default: the model's name.")] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Answers kept from `evaluate --json` or `convert --dry-run --json`; repeatable.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder to write each plot to as PNG.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files.")] = False,
    as_json: Json = False,
) -> None:
    """The story of a folder as one HTML file: what was done, measured and predicted, in tables and plots."""
    early.check_page(out, overwrite)
    early.check_used(model)
    show_result(api.report(model, out, results=results or (), png=png, overwrite=overwrite), Output(as_json))


@app.command(rich_help_panel=MEASURE)
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids, in the table's order.")],
    as_json: Json = False,
) -> None:
    """Several models in one table: size, cache, and the losses that `evaluate --record` kept in them."""
    for model in models:
        early.check_used(model)
    show_result(api.compare(models), Output(as_json))


def _push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that Upfit wrote.")],
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="Repository on the hub; made where it is not there.")],
    flags: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a folder on the hub, with a model card made from its recipe.json."""

    early.check_published(model)

    def ask(question: str) -> bool:
        return typer.confirm(question, err=True)

    answer = api.push(model, repo, ask=ask if sys.stdin.isatty() else None, progress=not quiet, **flags)
    show_result(answer, Output(as_json, quiet))


app.command("push", rich_help_panel=MEASURE)(with_flags(_push, PushOptions, "push"))
