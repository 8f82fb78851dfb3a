"""`upfit convert`, `merge` and `calibrate`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from upfit import api
from upfit.cli import early
from upfit.cli.base import ANSWER, AROUND, CHECKS, PLACES, Field, Json, Overwrite, Quiet, Revision, app, show_result, with_flags
from upfit.convert.recipe import NoOptions, Recipe, find_recipes
from upfit.output import Output
from upfit.text.files import FIELD

if TYPE_CHECKING:
    from upfit.convert.result import Conversion

# The flags that all conversions share.
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be written; write nothing.", rich_help_panel=ANSWER)]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type of all weights; default: kept (float32, bfloat16, float16)", rich_help_panel=PLACES),
]
ShardSize = Annotated[str | None, typer.Option(help="Largest file, e.g. 5GB; default: as the source.", rich_help_panel=PLACES)]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not check the result.", rich_help_panel=CHECKS)]
NoVerifyBytes = Annotated[
    bool,
    typer.Option("--no-verify-bytes", help="Do not read back what was written; check the rest.", rich_help_panel=CHECKS),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Fetch a hub model's files one at a time, and drop each when it is done with.",
        rich_help_panel=PLACES,
    ),
]
BLIND = ("mean", "first", "random")  # of the methods that merge heads: those that look at no text
ALIGNED_IS_BETTER = (
    "Heads were merged without a look at what they do. Without --method they are aligned on text where the model can be "
    "watched: that loses far less, and takes longer."
)


class Attentions(TyperGroup):
    """`upfit convert`: what follows is the name of an attention, which is easily forgotten."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            allowed = ", ".join(sorted(self.commands))
            ctx.fail(f"got {args[0]} for an attention; choose one of {allowed}, then give SRC and OUT")
        return super().resolve_command(ctx, args)


convert_app = typer.Typer(cls=Attentions, help="Convert a checkpoint to another attention.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")


def _add_conversion(
    target: typer.Typer, name: str, doc: str, options: type, run: "Callable[..., Conversion]", panel: str | None = None
) -> None:
    """A command SRC OUT with the flags of `options` and those that all conversions share."""

    def command(
        source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder, or hub id (id@revision).")],
        out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
        flags: dict[str, Any],
        dry_run: DryRun = False,
        dtype: Dtype = None,
        revision: Revision = None,
        max_shard_size: ShardSize = None,
        no_verify: NoVerify = False,
        no_verify_bytes: NoVerifyBytes = False,
        stream: Stream = False,
        overwrite: Overwrite = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        if not stream:
            early.check_conversion(source, out, flags, dtype, max_shard_size, overwrite)
        conversion = run(
            source,
            out,
            dry_run=dry_run,
            dtype=dtype,
            revision=revision,
            max_shard_size=max_shard_size,
            verify=not no_verify,
            verify_bytes=not no_verify_bytes,
            stream=stream,
            overwrite=overwrite,
            progress=not quiet,
            **flags,
        )
        output = Output(as_json, quiet)
        show_result(conversion, output)
        if flags.get("method") in BLIND and conversion.kv_heads[0] > conversion.kv_heads[1]:
            output.note(ALIGNED_IS_BETTER)
        if not dry_run:
            shown = " --data RECORDINGS" if conversion.reads == "sound" else ""  # for which nothing stands in
            output.note(f"Next: upfit evaluate {conversion.out} --against {conversion.source.name}{shown}")

    command.__doc__ = doc
    target.command(name, rich_help_panel=panel)(with_flags(command, options, name))


def _add_convert(recipe: Recipe) -> None:
    doc = f"{recipe.summary[0].upper()}{recipe.summary[1:]}. Paper: {recipe.paper}."
    _add_conversion(convert_app, recipe.name, doc, recipe.options, partial(api.convert, to=recipe.name))


for _recipe in find_recipes().values():
    _add_convert(_recipe)
_add_conversion(
    app, "merge", "Fold what a conversion added and training has learned into the stock class.", NoOptions, api.merge, AROUND
)


@app.command(rich_help_panel=AROUND)
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id (id@revision).")],
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Files (.txt, .jsonl, .json, .parquet, .gz ...) or folders; of sound or images if the model takes these.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="STATS", help="Statistics file to write, NAME.safetensors.")],
    field: Field = FIELD,
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
    early.check_statistics_output(out, overwrite)
    early.check_calibration(texts, calibration_tokens, field)
    early.check_model(model)
    output = Output(as_json, quiet)
    answer = api.calibrate(
        model,
        texts,
        out,
        field=field,
        calibration_tokens=calibration_tokens,
        calibration_length=calibration_length,
        revision=revision,
        overwrite=overwrite,
        progress=not quiet,
    )
    show_result(answer, output)
    output.note(f"Next: upfit convert gqa {model} OUT --kv-heads N --calibration {out}")
