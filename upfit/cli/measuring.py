"""`upfit evaluate`, `report`, `compare` and `push`: measuring a model, and showing or publishing the result."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from upfit.cli.base import Json, Quiet, app, with_flags
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.output import Output, human_bytes
from upfit.publish.options import Options as PushOptions


def _evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    flags: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Loss and perplexity with intervals, KV-cache bytes and speed; against another model on the same text."""
    from upfit.evaluate.evaluate import evaluate as run
    from upfit.evaluate.tables import show as show_result

    output = Output(as_json, quiet)
    result = run(model, EvaluateOptions(**flags), output)
    output.json(result)
    show_result(result, output)


app.command("evaluate")(with_flags(_evaluate, EvaluateOptions, "evaluate"))


@app.command()
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
    from upfit.report.run import report as run

    output = Output(as_json)
    answer = run(model, out, results or [], png, overwrite)
    output.json(answer)
    output.line(f"Wrote {answer['out']}" + (f" and {len(answer['plots'])} plots to {png}" if png else ""))


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids, in the table's order.")],
    as_json: Json = False,
) -> None:
    """Several models in one table: size, cache, and the losses that `evaluate --record` kept in them."""
    from upfit.report.compare import COLUMNS
    from upfit.report.compare import compare as run

    output = Output(as_json)
    told = run(models)
    output.json(told)
    for group in told:
        output.table(list(COLUMNS), group["rows"], group["title"])


def _push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that Upfit wrote.")],
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="Repository on the hub; made where it is not there.")],
    flags: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a folder on the hub, with a model card made from its recipe.json."""
    from upfit.publish.push import push as run

    def ask(question: str) -> bool:
        return typer.confirm(question, err=True)

    output = Output(as_json, quiet)
    answers = run(str(model), repo, PushOptions(**flags), ask if sys.stdin.isatty() else None, output)
    output.json(answers if flags["all"] else answers[0])
    for answer in answers:
        _show_push(answer, output)


def _show_push(answer: dict[str, Any], output: Output) -> None:
    if not answer["dry_run"]:
        output.line(f"Published {answer['url']}: {len(answer['files'])} files, {human_bytes(answer['bytes'])}")
        return
    rows = [[name, human_bytes(size)] for name, size in answer["files"].items()]
    output.table(["file", "size"], rows, f"Would send to {answer['repo']}")
    output.line(f"{len(rows)} files, {human_bytes(answer['bytes'])}")
    for name in answer["left_out"]:
        output.line(f"Stays here: {name}")
    for doubt in answer["doubts"]:
        output.line(f"Would ask: {doubt}")


app.command("push")(with_flags(_push, PushOptions, "push"))
