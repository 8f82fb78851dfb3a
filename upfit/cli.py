"""The command line: parse, call one function, print. Everything heavy is imported inside the commands."""

import dataclasses
import inspect
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from upfit import __version__
from upfit.convert.recipe import Recipe, find_recipes
from upfit.errors import UpfitError
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.longcontext.options import Options as SynthOptions
from upfit.options import choices, flag
from upfit.output import Output, human_bytes, human_count
from upfit.plan.options import Options as PlanOptions
from upfit.publish.options import Options as PushOptions
from upfit.uptrain.config import Config as UptrainConfig

app = typer.Typer(
    name="upfit",
    help="Give a pretrained language model a new attention, and make it good again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(help="Convert a checkpoint to another attention.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")

Json = Annotated[bool, typer.Option("--json", help="Answer as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that Upfit wrote.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model (also MODEL@REVISION).")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(f"upfit {__version__}")
        raise typer.Exit


def _flags_of(settings: type, unset: bool = False) -> list[inspect.Parameter]:
    """One keyword parameter for every field of an options dataclass: the field is the flag.

    With `unset` every flag may be left out and is then None, so that the caller can tell what the user gave.
    """
    hints = typing.get_type_hints(settings)
    parameters = []
    for field in dataclasses.fields(settings):
        annotation, default, text = hints[field.name], field.default, field.metadata["help"]
        allowed = choices(annotation)
        if allowed:
            annotation, text = str, f"{text} ({', '.join(map(str, allowed))})"
        if unset:
            text += "" if default is None else f" [default: {str(default).lower() if annotation is bool else default}]"
            annotation, default = annotation | None, None
        names = (
            (f"{flag(field.name)}/{flag('no_' + field.name)}",) if annotation in (bool, bool | None) else (flag(field.name),)
        )
        names = (flag(field.name),) if default is False else names
        declared = typer.Option(*names, help=text.replace("[", "\\["))
        given = inspect.Parameter.empty if default is dataclasses.MISSING else default
        kind = Annotated[annotation, declared]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=kind))
    return parameters


def _with_flags(command: Callable[..., None], settings: type, name: str, unset: bool = False) -> Callable[..., None]:
    """`command(..., flags: dict)` as a function that has the flags of `settings` in its signature."""
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in inspect.signature(command).parameters.values()]
    own = [p for p in own if p.name != "flags"]
    fields = {field.name for field in dataclasses.fields(settings)}
    positional = [p for p in own if p.default is inspect.Parameter.empty]
    rest = [p for p in own if p.default is not inspect.Parameter.empty]

    def run(**values: Any) -> None:
        flags = {key: value for key, value in values.items() if key in fields}
        command(**{key: value for key, value in values.items() if key not in fields}, flags=flags)

    run.__name__, run.__doc__ = name, command.__doc__
    run.__signature__ = inspect.Signature([*positional, *_flags_of(settings, unset), *rest])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


def _add_conversion(target: typer.Typer, name: str, doc: str, options: type, run: Callable[..., dict[str, Any]]) -> None:
    """A command SRC OUT with the flags of `options` and those that all conversions share."""

    def command(
        source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder, or hub id (id@revision).")],
        out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
        flags: dict[str, Any],
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written; write nothing.")] = False,
        dtype: Annotated[
            str | None, typer.Option(help="Type of all weights; default: kept (float32, bfloat16, float16)")
        ] = None,
        revision: Revision = None,
        max_shard_size: Annotated[str | None, typer.Option(help="Largest file, e.g. 5GB; default: as the source.")] = None,
        no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check the result.")] = False,
        overwrite: Overwrite = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        from upfit.convert.conversion import Settings

        output = Output(as_json, quiet)
        size = parse_size(max_shard_size) if max_shard_size else None
        settings = Settings(dry_run, dtype, revision, size, not no_verify, overwrite)
        answer = run(source, out, options(**flags), settings, output)
        output.json(answer)
        _show_conversion(answer, output)

    command.__doc__ = doc
    target.command(name)(_with_flags(command, options, name))


def _add_convert(recipe: Recipe) -> None:
    def run(source: str, out: Path, options: Any, settings: Any, output: Output) -> dict[str, Any]:
        from upfit.convert.conversion import convert

        return convert(recipe, source, out, options, settings, output)

    doc = f"{recipe.summary[0].upper()}{recipe.summary[1:]}. Paper: {recipe.paper}."
    _add_conversion(convert_app, recipe.name, doc, recipe.options, run)


@dataclasses.dataclass(frozen=True)
class _NoOptions:
    """`upfit merge` has no flags of its own."""


def _merge(source: str, out: Path, options: Any, settings: Any, output: Output) -> dict[str, Any]:
    from upfit.convert.conversion import merge

    return merge(source, out, settings, output)


def _show_conversion(answer: dict[str, Any], output: Output) -> None:
    if answer["dry_run"]:
        rows = [
            [row["tensor"], str(list(row["before"] or [])), str(list(row["after"])), row["rule"]] for row in answer["tensors"]
        ]
        output.table(["tensor", "before", "after", "rule"], rows, "Would write")
    if answer.get("sensitivity"):
        _show_sensitivity(answer["sensitivity"], output)
    before, after = answer["kv_bytes_per_token"]
    verb = "Would write" if answer["dry_run"] else "Wrote"
    cache = f"KV cache {human_bytes(before)} a token, as before"
    if before != after:
        heads = f"{answer['kv_heads'][0]} → {answer['kv_heads'][1]} key/value heads"
        cache = f"{heads}, KV cache {human_bytes(before)} → {human_bytes(after)} a token ({before / after:.2f}x smaller)"
    added = answer["parameters"][1] - answer["parameters"][0]
    more = f" (+{human_count(added)})" if added > 0 else ""
    output.line(
        f"{verb} {answer['out']}: {human_bytes(answer['bytes'][1])}, "
        f"{human_count(answer['parameters'][1])} parameters{more}, {cache}"
    )
    if answer["dry_run"]:
        return
    report = answer["verify"]
    if report:
        output.line(f"Verified: {report['structure']}; {report['numbers']}")
        if report["loss"] is not None and not report["equal"]:
            output.line(
                f"Loss on a short text of {report['tokens']} tokens: {report['source_loss']:.3f} → {report['loss']:.3f} "
                f"({report['loss'] - report['source_loss']:+.3f}) nats a token"
            )
    output.note(f"Next: upfit evaluate {answer['out']} --against {answer['source']['name']}")


def _show_sensitivity(told: dict[str, Any], output: Output) -> None:
    """Predicted errors of each layer for each number of heads it could have, as attention / output."""
    counts = [count for count in told["kv_heads"] if count < max(told["kv_heads"])]
    rows = []
    for layer in told["layers"]:
        choices = {choice["kv_heads"]: choice for choice in layer["choices"]}
        cells = [_errors(choices[count]) if count in choices else "" for count in counts]
        rows.append([layer["layer"], *cells])
    for name, label in (("", "mean of the layers"), ("largest_", "largest")):
        means = {row["kv_heads"]: row for row in told["totals"]}
        rows.append([label, *[_errors(means[count], name) for count in counts]])
    totals = {row["kv_heads"]: human_bytes(row["kv_bytes_per_token"]) for row in told["totals"]}
    rows.append(["KV cache a token", *[totals[count] for count in counts]])
    title = "Predicted error of attention / output before any refit, by key/value heads (share of its energy)"
    output.table(["layer", *map(str, counts)], rows, title)


def _errors(choice: dict[str, Any], prefix: str = "") -> str:
    pair = (choice[f"{prefix}attention_error"], choice[f"{prefix}output_error"])
    return " / ".join("-" if value is None else f"{value:.3f}" for value in pair)


for _recipe in find_recipes().values():
    _add_convert(_recipe)
_add_conversion(app, "merge", "Fold what a conversion added and training has learned into the stock class.", _NoOptions, _merge)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Text files, .jsonl files or folders of them.")],
    out: Annotated[Path, typer.Argument(metavar="STATS", help="Statistics file to write, NAME.safetensors.")],
    calibration_tokens: Annotated[str, typer.Option(help="Tokens of text to use.")] = "64k",
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens of a window: the length to be served; default: 2048, or what the model allows.")
    ] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a statistics file.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Watch a model read text, and keep statistics of every attention layer for conversions that use data."""
    from upfit.convert.calibrate import calibrate as run

    output = Output(as_json, quiet)
    answer = run(model, list(texts), out, calibration_tokens, calibration_length, revision, overwrite, output)
    output.json(answer)
    output.line(
        f"Wrote {out}: {human_bytes(answer['bytes'])}, {answer['layers']} attention layers watched on "
        f"{answer['tokens']:,} tokens in {answer['seconds']:.0f} s"
    )
    for path, reason in answer["not_watched"].items():
        output.line(f"Not watched: {path}: {reason}")
    output.note(f"Next: upfit convert gqa {model} OUT --kv-heads N --calibration {out}")


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """Recipes, and the architectures they apply to."""
    from upfit.convert.architectures import table

    output, known = Output(as_json), table()
    recipes = [{"name": r.name, "summary": r.summary, "paper": r.paper} for r in find_recipes().values()]
    output.json({"recipes": recipes, "architectures": sorted(known.entries), "refused": dict(sorted(known.refused.items()))})
    for recipe in recipes:
        output.line(f"{recipe['name']:6} {recipe['summary']}\n       {recipe['paper']}")
    output.line(f"\n{len(known.entries)} architectures: {', '.join(sorted(known.entries))}")
    output.line(f"\n{len(known.refused)} model types are refused, each with its reason (--json lists them).")


@app.command()
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Architecture, heads, parameters, KV bytes per token, history, and what the model can become."""
    from upfit.convert.describe import as_rows, describe

    output = Output(as_json)
    told = describe(model, revision)
    output.json(told)
    rows = [
        *as_rows(told),
        *[["history" if not i else "", f"{s['date']}  {s['verb']}"] for i, s in enumerate(told["history"])],
        *[["can become" if not i else "", line] for i, line in enumerate(told["can_become"])],
    ]
    for name, value in rows:
        output.line(f"{name:17} {value}")


@app.command()
def prepare(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Files, folders, or a hub data set id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer is used: folder or hub id.")],
    field: Annotated[str, typer.Option(help="Field of jsonl and parquet rows that holds the text.")] = "text",
    tokens: Annotated[str | None, typer.Option(help="Stop after so many tokens, such as 100M; default: all.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn text into token shards for uptraining (txt, jsonl, parquet, hub data set)."""
    from upfit.uptrain.prepare import prepare as run

    output = Output(as_json, quiet)
    manifest = run(list(texts), out, tokenizer, field, output, overwrite, tokens)
    output.json(manifest)
    output.line(f"Wrote {out}: {human_count(manifest['tokens'])} tokens of {manifest['documents']} documents")
    output.note(f"Next: upfit uptrain MODEL {out} OUT --tokens {human_count(manifest['tokens']).replace(' ', '')}")


def _plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to train: folder or hub id.")],
    flags: dict[str, Any],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """FLOPs, memory and GPU-hours of an uptraining, before anything runs."""
    from upfit.plan.plan import plan as run
    from upfit.plan.show import show as show_plan

    output = Output(as_json)
    told = run(model, PlanOptions(**flags), revision)
    output.json(told)
    show_plan(told, output)


app.command("plan")(_with_flags(_plan, PlanOptions, "plan"))


def _uptrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to train: folder or hub id.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Text of `upfit prepare`, or questions of `upfit synth`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; checkpoints go to OUT.uptrain.")],
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file with these settings; flags go first.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of OUT.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted model to be good again, with its former self as teacher."""
    from upfit.uptrain.config import resolve
    from upfit.uptrain.train import uptrain as run

    output = Output(as_json, quiet)
    resolved = resolve(config, {name: value for name, value in flags.items() if value is not None})
    report = run(model, data, out, resolved, resume, overwrite, output)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process comes here, one tells
        output.json(report)
        _show_uptraining(report, out, output)


def _show_uptraining(report: dict[str, Any], out: Path, output: Output) -> None:
    if report["stopped"]:
        output.line(f"Stopped at step {report['step']} of {report['steps']}; the same command with --resume goes on")
        return
    output.line(
        f"Wrote {out}: {human_count(report['tokens'])} tokens in {report['seconds']:.0f} s, "
        f"{report['tokens_per_second']:.0f} tokens/s, {report['skipped']} steps skipped"
    )
    before, after = report["holdout"]["before"], report["holdout"]["after"]
    if before:
        line = f"Held-out loss of {report['holdout_rows']} rows of DATA: {before['ce']:.3f} → {after['ce']:.3f} nats a token"
        output.line(line + (f" (teacher {before['teacher_ce']:.3f})" if "teacher_ce" in before else ""))
    output.note(f"Next: upfit evaluate {out} --against SOURCE")


app.command("uptrain")(_with_flags(_uptrain, UptrainConfig, "uptrain", unset=True))


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


app.command("evaluate")(_with_flags(_evaluate, EvaluateOptions, "evaluate"))


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


def _synth(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Files, folders, or a hub data set id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; work lies in OUT.synth until it is whole.")],
    flags: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Long-context training data: questions whose answers stand anywhere in 4k to 32k tokens (IN2)."""
    from upfit.longcontext.synth import synth as run

    output = Output(as_json, quiet)
    answer = run(list(texts), out, SynthOptions(**flags), output)
    output.json(answer)
    if not answer["finished"]:
        output.line(f"This part is done; {len(answer['missing'])} others are not yet, such as {answer['missing'][0]}")
        return
    families = ", ".join(f"{name} {count:,}" for name, count in answer["families"].items())
    recipes = human_bytes(answer["bytes"])
    output.line(f"Wrote {out}: {answer['items']:,} examples ({families}), their contexts as {recipes} of recipes")


app.command("synth")(_with_flags(_synth, SynthOptions, "synth"))


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


app.command("push")(_with_flags(_push, PushOptions, "push"))


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


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")] = Path("upfit-demo"),
    tokens: Annotated[str, typer.Option(help="Tokens to uptrain each conversion on.")] = "70k",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """All of it on the embedded model, on a CPU, in minutes: convert, uptrain, evaluate, table and plot."""
    from upfit.demo.run import run_demo
    from upfit.demo.show import show as show_demo

    output = Output(as_json, quiet)
    result = run_demo(out, tokens, overwrite, output)
    output.json(result)
    show_demo(result, output)


@app.command()
def env(as_json: Json = False) -> None:
    """Versions and hardware, for bug reports."""
    from upfit.environment import environment

    output, told = Output(as_json), environment()
    output.json(told)
    for name, value in told.items():
        output.line(f"{name:17} {value}")


def parse_size(text: str) -> int:
    """`5GB`, `500MB` → bytes, powers of 1000 as the hub counts. Raises UpfitError for anything else."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UpfitError(f"--max-shard-size got {text!r}; give a size such as 500MB or 5GB")
    return size


def main() -> None:
    """Entry point: errors a user can cause are one line and exit 1; a traceback only with `--debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UpfitError as error:
        if "--debug" in sys.argv:
            raise
        if os.environ.get("RANK", "0") == "0":  # under torchrun all processes fail alike, one tells
            print(f"upfit: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("upfit: stopped; nothing unfinished was kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
