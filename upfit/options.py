"""Settings as frozen dataclasses whose fields are the command line's flags: name, type, default and help stand once.

    @dataclass(frozen=True)
    class Options:
        kv_heads: int = option(help="key/value heads of the result")            # required: --kv-heads N
        method: Literal["mean", "first"] = option("mean", help="how to merge")  # --method mean|first

`cli/` turns the fields into flags; `check` refuses a value that its field's type does not allow.
"""

import dataclasses
import types
import typing
from typing import Any, Literal, get_args, get_origin

from upfit.errors import UpfitError


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """A field of an options dataclass; without `default` the flag is required."""
    return dataclasses.field(default=default, metadata={"help": help})


def flag(name: str) -> str:
    """`kv_heads` → `--kv-heads`."""
    return "--" + name.replace("_", "-")


def as_flags(settings: Any) -> list[str]:
    """The words of a command line that give `settings` again: every field that is not at its default."""
    words: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else flag(f"no_{field.name}"))
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                words += [flag(field.name), str(item)]
    return words


def choices(annotation: Any) -> tuple[Any, ...] | None:
    """The values a `Literal[...]` annotation allows, None for any other type."""
    return get_args(annotation) if get_origin(annotation) is Literal else None


def check(settings: Any) -> None:
    """Raise UpfitError when a field of the dataclass instance `settings` holds a value its annotation does not allow."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, annotation = getattr(settings, field.name), hints[field.name]
        allowed = choices(annotation)
        if allowed is not None:
            if value not in allowed:
                raise UpfitError(f"{flag(field.name)} {value!r} is not known; choose one of {', '.join(map(str, allowed))}")
        elif not fits(value, annotation):
            raise UpfitError(f"{flag(field.name)} got {value!r}; it takes {_type_name(annotation)}")
        elif isinstance(value, int | float) and not abs(value) < MOST:
            raise UpfitError(f"{flag(field.name)} got {_short(value)}; give a finite number, of less than 19 digits")


def fits(value: Any, annotation: Any) -> bool:
    """Whether `value` is what the annotation says; of a list or tuple its items are not looked at."""
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is typing.Union:
        return any(fits(value, part) for part in get_args(annotation))
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    plain = get_origin(annotation) or annotation
    return isinstance(value, plain) if isinstance(plain, type) else True


def _short(value: int | float) -> str:
    return str(value) if isinstance(value, float) or abs(value) < 10**40 else "more than 40 digits"


def _type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation))


MOST = 10**18  # libraries count in 63 bits
SUFFIXES = {"k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_count(text: str, name: str) -> int:
    """`50k`, `1.5M`, `2B`, `2T` or plain digits → an integer of at least 1.

    Raises UpfitError naming `name` (the flag) for anything else.
    """
    text = text.strip().replace("_", "")
    scale = SUFFIXES.get(text[-1:], 1)
    try:
        count = round(float(text[:-1] if scale != 1 else text) * scale)
    except (ValueError, OverflowError):
        count = 0
    if not 1 <= count < MOST:
        raise UpfitError(f"{name} got {text!r}; give a positive number such as 50000, 50k, 100M or 2T")
    return count


def parse_share(text: str, name: str) -> float:
    """`5%` or `0.05` → 0.05. Raises UpfitError naming `name` when it is not above 0 and at most 1."""
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UpfitError(f"{name} got {text!r}; give a share such as 5% or 0.05")
    return share
