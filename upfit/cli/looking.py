"""`upfit list`, `show`, `demo` and `env`."""

from pathlib import Path
from typing import Annotated

import typer

from upfit import api
from upfit.cli import early
from upfit.cli.base import AROUND, MACHINE, Json, Quiet, Revision, app, show_result
from upfit.convert.recipe import find_recipes
from upfit.output import Output


@app.command("list", rich_help_panel=AROUND)
def list_command(as_json: Json = False) -> None:
    """Attentions that a model can be given, and the architectures they apply to."""
    from upfit.architecture.listing import MOVED, OWN, model_types

    output, types = Output(as_json), model_types()
    known = [name for name, entry in types.items() if entry["how"] != "refused"]
    recipes = [{"name": r.name, "summary": r.summary, "paper": r.paper} for r in find_recipes().values()]
    output.json({"recipes": recipes, "model_types": types})
    for recipe in recipes:
        output.line(f"{recipe['name']:6} {recipe['summary']}\n       {recipe['paper']}")
    output.line(f"\n{len(known)} architectures: {', '.join(known)}")
    own = [name for name in known if types[name]["how"] == OWN]
    output.line(f"\n{len(own)} of them need a class of ours for fewer heads: {', '.join(own)}")
    moved = {name: entry["to"] for name, entry in types.items() if entry["how"] == MOVED}
    output.line("\nOf these change their type: " + ", ".join(f"{name} → {' or '.join(to)}" for name, to in moved.items()))
    output.line(
        f"\n{len(types) - len(known)} more model types of transformers are refused, each with its reason (--json lists them)."
    )


@app.command(rich_help_panel=AROUND)
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Architecture, heads, parameters, KV bytes per token, history, and what the model can become."""
    early.check_used(model)
    show_result(api.describe(model, revision=revision), Output(as_json))


@app.command(rich_help_panel=MACHINE)
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")] = Path("upfit-demo"),
    tokens: Annotated[str, typer.Option(help="Tokens to uptrain each conversion on.")] = "70k",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """All of it on the embedded model, on a CPU, in minutes: convert, uptrain, evaluate, table and plot."""
    early.check_budget(tokens, None, None)
    early.check_new_folder(out, overwrite)
    from upfit.demo.run import run_demo
    from upfit.demo.show import show as show_demo

    output = Output(as_json, quiet)
    result = run_demo(out, tokens, overwrite, output)
    output.json(result)
    show_demo(result, output)


@app.command(rich_help_panel=MACHINE)
def env(as_json: Json = False) -> None:
    """Versions and hardware, for bug reports."""
    from upfit.environment import environment

    output, versions = Output(as_json), environment()
    output.json(versions)
    for name, value in versions.items():
        output.line(f"{name:17} {value}")
