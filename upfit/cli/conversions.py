"""`upfit convert`, `merge` and `calibrate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from upfit.cli.base import Json, Overwrite, Quiet, Revision, app, with_flags
from upfit.convert.recipe import NoOptions, Recipe, find_recipes
from upfit.errors import UpfitError
from upfit.output import Output, cache_change, human_bytes, human_count

convert_app = typer.Typer(help="Convert a checkpoint to another attention.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")


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
        no_verify_bytes: Annotated[
            bool, typer.Option("--no-verify-bytes", help="Do not read back what was written; check the rest.")
        ] = False,
        stream: Annotated[
            bool, typer.Option("--stream", help="Fetch a hub model's files one at a time, and drop each when it is done with.")
        ] = False,
        overwrite: Overwrite = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        from upfit.convert.conversion import Settings

        output = Output(as_json, quiet)
        size = parse_size(max_shard_size) if max_shard_size else None
        settings = Settings(dry_run, dtype, revision, size, not no_verify, overwrite, stream, not no_verify_bytes)
        answer = run(source, out, options(**flags), settings, output)
        output.json(answer)
        _show_conversion(answer, output)

    command.__doc__ = doc
    target.command(name)(with_flags(command, options, name))


def _add_convert(recipe: Recipe) -> None:
    def run(source: str, out: Path, options: Any, settings: Any, output: Output) -> dict[str, Any]:
        from upfit.convert.conversion import convert

        return convert(recipe, source, out, options, settings, output)

    doc = f"{recipe.summary[0].upper()}{recipe.summary[1:]}. Paper: {recipe.paper}."
    _add_conversion(convert_app, recipe.name, doc, recipe.options, run)


def _merge(source: str, out: Path, options: Any, settings: Any, output: Output) -> dict[str, Any]:
    from upfit.convert.conversion import merge

    return merge(source, out, settings, output)


def cache_words(answer: dict[str, Any]) -> str:
    """What became of key/value heads and of the bytes that a token's keys and values take."""
    heads = answer["kv_heads"]
    changed = f"{heads[0]} → {heads[1]} key/value heads, " if heads[0] != heads[1] else ""
    return changed + cache_change(*answer["kv_bytes_per_token"])


def sanity_words(report: dict[str, Any]) -> str:
    """The loss on the sample text, as what it is: enough to see a broken model, not to judge a whole one."""
    before, after, interval = report["source_loss"], report["loss"], report["loss_interval"]
    width = f" ± {interval:.3f}" if interval is not None else ""
    return (
        f"Sanity check on {report['tokens']} tokens of a text of Upfit's own: {before:.3f} → {after:.3f} "
        f"({after - before:+.3f}{width}) nats a token; that is no measurement, which is upfit evaluate's"
    )


def _show_conversion(answer: dict[str, Any], output: Output) -> None:
    if answer["dry_run"]:
        rows = [
            [row["tensor"], str(list(row["before"] or [])), str(list(row["after"])), row["rule"]] for row in answer["tensors"]
        ]
        output.table(["tensor", "before", "after", "rule"], rows, "Would write")
    if answer.get("sensitivity"):
        _show_sensitivity(answer["sensitivity"], output)
    verb = "Would write" if answer["dry_run"] else "Wrote"
    added = answer["parameters"][1] - answer["parameters"][0]
    more = f" (+{human_count(added)})" if added > 0 else ""
    output.line(
        f"{verb} {answer['out']}: {human_bytes(answer['bytes'][1])}, "
        f"{human_count(answer['parameters'][1])} parameters{more}, {cache_words(answer)}"
    )
    if answer["dry_run"]:
        return
    report = answer["verify"]
    if report:
        output.line(f"Verified: {report['structure']}; {report['numbers']}")
        if report["loss"] is not None and not report["equal"]:
            output.line(sanity_words(report))
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
_add_conversion(app, "merge", "Fold what a conversion added and training has learned into the stock class.", NoOptions, _merge)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="Files (.txt, .jsonl, .json, .parquet, .gz ...) or folders.")
    ],
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
    from upfit.calibration.calibrate import calibrate as run

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
