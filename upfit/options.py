"""Settings as frozen dataclasses whose fields are the command line's flags: name, type, default and help stand once.

    @dataclass(frozen=True)
    class Options:
        kv_heads: int = option(help="key/value heads of the result")            # required: --kv-heads N
        method: Literal["mean", "first"] = option("mean", help="how to merge")  # --method mean|first

A field may say its range (`at_least=1`), and that it is no flag but a key of a config file alone (`flag=False`). `cli/` turns
the fields into flags and `api.py` into keywords; `check` refuses a value that its field's type or range does not allow.
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from upfit.errors import UpfitError

RANGE = ("at_least", "above", "at_most", "below")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    flag: bool = True,
    goes_with: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of an options dataclass; without `default` the flag is required. The range is that of each item of a list.

    `goes_with` names another field, and the values of that with which alone this one does anything; without values, any does.
    """
    limits = dict(zip(RANGE, (at_least, above, at_most, below), strict=True))
    metadata = {
        "help": help,
        "flag": flag,
        "goes_with": goes_with,
        **{name: limit for name, limit in limits.items() if limit is not None},
    }
    return dataclasses.field(default=default, metadata=metadata)


def same_option(settings: type, name: str, **changes: Any) -> Any:
    """The option `name` of another dataclass, but for the `changes`: a fact that two verbs share stands once. Always a flag."""
    field = field_of(settings, name)
    return option(**{"default": field.default, **field.metadata, "flag": True, **changes})


def field_of(settings: Any, name: str) -> dataclasses.Field[Any]:
    """The field `name` of an options dataclass, or of an instance of one."""
    return next(field for field in dataclasses.fields(settings) if field.name == name)


def flag(name: str) -> str:
    """`kv_heads` → `--kv-heads`."""
    return "--" + name.replace("_", "-")


def shown(settings: Any, name: str) -> str:
    """How a message names the field `name` of a dataclass: as the flag it is, or as the key."""
    return flag(name) if field_of(settings, name).metadata["flag"] else name


def help_of(settings: type, field: dataclasses.Field[Any]) -> str:
    """What is said of an option: with what it goes, and what it does."""
    company = field.metadata["goes_with"]
    return f"with {_company(settings, company)}: {field.metadata['help']}" if company else str(field.metadata["help"])


def as_flags(settings: Any) -> list[str]:
    """The words of a command line that give `settings` again: every flag that is not at its default."""
    words: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default or not field.metadata["flag"]:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else flag(f"no_{field.name}"))
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                words += [flag(field.name), str(item)]
    return words


def from_keywords(settings: type, keywords: Mapping[str, Any], whose: str, beside: Iterable[str] = ()) -> dict[str, Any]:
    """What a caller in Python gave for the fields of an options dataclass, as their types want it.

    `whose` takes them, and the keywords `beside` too. Raises UpfitError for a name that is none of all these, and for a field
    without a default that is not given.
    """
    fields, hints = dataclasses.fields(settings), typing.get_type_hints(settings)
    allowed = [*(field.name for field in fields), *beside]
    for name in keywords:
        if name not in hints:
            near = difflib.get_close_matches(name, allowed, 1)
            meant = f"; did you mean {near[0]}?" if near else ";"
            raise UpfitError(f"{whose} got an unknown keyword {name!r}{meant} allowed are {', '.join(allowed)}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in keywords:
            raise UpfitError(f"{whose} needs the keyword {field.name}: {field.metadata['help']}")
    return {name: as_kind(value, hints[name]) for name, value in keywords.items()}


def as_kind(value: Any, annotation: Any) -> Any:
    """A number or Path where the annotation wants text, text where it wants a Path, and one of a kind where it wants a list."""
    kinds = get_args(annotation) if get_origin(annotation) in (types.UnionType, typing.Union) else (annotation,)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if lists and value is not None:
        single = isinstance(value, str | Path | numbers.Number)
        return [as_kind(item, get_args(lists[0])[0]) for item in ([value] if single else value)]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)  # numpy's too
    if str in kinds and isinstance(value, Path | int | float) and not isinstance(value, bool):
        return str(value)
    return Path(value) if Path in kinds and isinstance(value, str) else value


def as_keys(settings: Any) -> dict[str, Any]:
    """What `as_flags` leaves out, since it is a key of a config file alone: each that is not at its default."""
    values = {field: getattr(settings, field.name) for field in dataclasses.fields(settings) if not field.metadata["flag"]}
    return {field.name: value for field, value in values.items() if value != field.default}


def choices(annotation: Any) -> tuple[Any, ...] | None:
    """The values a `Literal[...]` annotation allows, None for any other type."""
    return get_args(annotation) if get_origin(annotation) is Literal else None


def check(settings: Any) -> None:
    """Raise UpfitError when a field of the dataclass instance `settings` holds a value its type or range does not allow."""
    check_values(type(settings), {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)})
    check_company(settings)


def check_company(settings: Any) -> None:
    """Raise UpfitError when an option is given that goes with another one, where that does not have the value for it."""
    for field in dataclasses.fields(settings):
        company, value = field.metadata["goes_with"], getattr(settings, field.name)
        if not company or value == field.default:
            continue
        other, *allowed = company
        chosen = getattr(settings, other)
        values = chosen if isinstance(chosen, list) else [chosen] * (chosen is not None)
        if not values or (allowed and not set(allowed) & set(values)):
            spelled = flag(f"no_{field.name}") if value is False else shown(settings, field.name)
            wanted = _company(settings, company)
            but = f", not {' and '.join(map(str, values))}; leave it out" if values else f"; add {wanted}, or leave it out"
            raise UpfitError(f"{spelled} goes with {wanted}{but}")


def _company(settings: Any, company: tuple[str, ...]) -> str:
    """`--ask openai or hf`."""
    other, *allowed = company
    start = [", ".join(allowed[:-1])] if len(allowed) > 1 else []
    return " ".join([shown(settings, other), " or ".join([*start, *allowed[-1:]])]).rstrip()


def check_values(settings: type, values: dict[str, Any]) -> None:
    """Raise UpfitError when one of the `values` is none that its field of `settings` allows."""
    hints = typing.get_type_hints(settings)
    for name, value in values.items():
        annotation, title = hints[name], shown(settings, name)
        allowed = choices(annotation)
        if allowed is not None:
            if value not in allowed:
                raise UpfitError(f"{title} {value!r} is not known; choose one of {', '.join(map(str, allowed))}")
        elif not fits(value, annotation):
            raise UpfitError(f"{title} got {value!r}; it takes {_type_name(annotation)}")
        elif isinstance(value, int | float) and not abs(value) < MOST:
            raise UpfitError(f"{title} got {_short(value)}; give a finite number, of less than 19 digits")
        elif value is not None and not in_range(value, field_of(settings, name).metadata):
            raise UpfitError(f"{title} got {value}; it takes {range_words(field_of(settings, name).metadata)}")


def in_range(value: Any, limits: Mapping[str, Any]) -> bool:
    """Whether a number, or each of a list of some, is within the `limits` that an option has; without limits everything is."""
    if not any(name in limits for name in RANGE):
        return True
    if isinstance(value, list):
        return bool(value) and all(in_range(item, limits) for item in value)
    return (
        limits.get("at_least", value) <= value <= limits.get("at_most", value)
        and not value <= limits.get("above", -math.inf)
        and not value >= limits.get("below", math.inf)
    )


def range_words(limits: Mapping[str, Any]) -> str:
    """The range of an option in words: `2 or more`, `a number above 0`, `a number from 0 to 1`; empty without one."""
    low, high = limits.get("at_least"), limits.get("at_most")
    if low is not None and high is not None:
        return f"a number from {low} to {high}"
    if low is not None and "below" not in limits:
        return f"{low} or more"
    sides = [f"{word.replace('_', ' ')} {limits[word]}" for word in RANGE if word in limits]
    return f"a number {' and '.join(sides)}" if sides else ""


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


def parse_size(text: str | int, name: str) -> int:
    """`5GB`, `500MB` or a number of bytes → bytes, powers of 1000 as the hub counts. Raises UpfitError naming `name` for
    anything else."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = str(text).strip()[:-2], str(text).strip()[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UpfitError(f"{name} got {text!r}; give a size such as 500MB or 5GB")
    return size


def parse_share(text: str, name: str) -> float:
    """`5%` or `0.05` → 0.05. Raises UpfitError naming `name` when it is not above 0 and at most 1."""
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UpfitError(f"{name} got {text!r}; give a share such as 5% or 0.05")
    return share
