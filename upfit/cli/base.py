"""What all commands share: the program itself, common flags, and how the fields of an options dataclass become flags."""

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from upfit import __version__
from upfit.cli.boundary import carried
from upfit.errors import UpfitError
from upfit.options import check, check_values, choices, fits, flag, help_of
from upfit.output import Output
from upfit.results import Result
from upfit.text.files import FIELD_HELP

app = typer.Typer(
    name="upfit",
    help="Give a pretrained language model a new attention, and make it good again.",
    epilog="Begin with `upfit demo`, or `upfit show MODEL`. Then: convert, evaluate, prepare, plan, uptrain, evaluate, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Panels of `upfit --help`. `convert` alone is in none, so that it comes first.
AROUND, TRAIN, MEASURE, MACHINE = "Around a conversion", "Training", "Measuring and publishing", "Getting started"
ANSWER, PLACES, CHECKS = "Answer", "Source and output", "Checks"  # panels of flags that many commands share

Json = Annotated[bool, typer.Option("--json", help="Answer as JSON on stdout.", rich_help_panel=ANSWER)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress.", rich_help_panel=ANSWER)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that Upfit wrote.", rich_help_panel=PLACES)]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub model (also MODEL@REVISION).", rich_help_panel=PLACES)
]

Field = Annotated[str, typer.Option(help=f"{FIELD_HELP[0].upper()}{FIELD_HELP[1:]}.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(f"upfit {__version__}")
        raise typer.Exit


def show_result(result: Result, output: Output) -> None:
    """The answer of a verb, as JSON or as people read it."""
    output.json(result.record())
    result.show(output)


def carry_errors(commands: typer.Typer) -> None:
    """Let errors of every command arrive at `main` as they are (see `boundary.carried`)."""
    for command in commands.registered_commands:
        assert command.callback is not None
        command.callback = carried(command.callback)
    for group in commands.registered_groups:
        assert group.typer_instance is not None
        carry_errors(group.typer_instance)


def flags_of(settings: type, unset: bool = False) -> list[inspect.Parameter]:
    """One keyword parameter for every field of an options dataclass: the field is the flag.

    With `unset` every flag may be left out and is then None, so that the caller can tell what the user gave. A field that is a
    key of a config file alone is taken too, unseen, so that whoever gives it is told where it belongs (`refuse_key`).
    """
    hints = typing.get_type_hints(settings)
    parameters = []
    for field in dataclasses.fields(settings):
        annotation, default, text = hints[field.name], field.default, help_of(settings, field)
        allowed = choices(annotation)
        if allowed:
            annotation, text = str, f"{text} ({', '.join(map(str, allowed))})"
        if not field.metadata["flag"]:
            annotation, default = (bool if annotation is bool else str) | None, None
        elif unset:
            text += "" if default is None else f" [default: {str(default).lower() if annotation is bool else default}]"
            annotation, default = annotation | None, None
        names = (
            (f"{flag(field.name)}/{flag('no_' + field.name)}",) if annotation in (bool, bool | None) else (flag(field.name),)
        )
        names = (flag(field.name),) if default is False else names
        company = field.metadata["goes_with"]
        declared = typer.Option(
            *names,
            help=text.replace("[", "\\["),
            hidden=not field.metadata["flag"],
            rich_help_panel=f"With {flag(company[0])}" if company else None,
        )
        start = inspect.Parameter.empty if default is dataclasses.MISSING else default
        kind = Annotated[annotation, declared]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=start, annotation=kind))
    return parameters


def refuse_key(settings: type, values: dict[str, Any]) -> None:
    """Raise UpfitError when one of the flags that were given is a key of the config file alone."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        value = values.get(field.name)
        if value is not None and not field.metadata["flag"]:
            spelled = flag(f"no_{field.name}" if value is False else field.name)
            # A number comes as the text it is; JSON's spelling of strings and booleans is valid TOML.
            shown = value if isinstance(value, str) and not fits(value, hints[field.name]) else json.dumps(value)
            line = f"{field.name} = {shown}"
            raise UpfitError(f"{spelled} is a key of the config file now: write {line} into a TOML file and give --config FILE")


def with_flags(command: Callable[..., None], settings: type, name: str, unset: bool = False) -> Callable[..., None]:
    """`command(..., flags: dict)` as a function that has the flags of `settings` in its signature."""
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in inspect.signature(command).parameters.values()]
    own = [p for p in own if p.name != "flags"]
    fields = {field.name for field in dataclasses.fields(settings)}
    positional = [p for p in own if p.default is inspect.Parameter.empty]
    rest = [p for p in own if p.default is not inspect.Parameter.empty]

    def run(**values: Any) -> None:
        flags = {key: value for key, value in values.items() if key in fields}
        refuse_key(settings, flags)
        if unset:  # a file may say the rest
            check_values(settings, {key: value for key, value in flags.items() if value is not None})
        else:
            check(settings(**flags))  # before the command imports torch
        command(**{key: value for key, value in values.items() if key not in fields}, flags=flags)

    run.__name__, run.__doc__ = name, command.__doc__
    run.__signature__ = inspect.Signature([*positional, *flags_of(settings, unset), *rest])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run
