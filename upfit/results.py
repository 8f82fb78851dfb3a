"""What the verbs answer, as frozen dataclasses: `record()` is the dictionary of `--json`, the text is what a terminal shows.

Each verb has its own in its room's `result.py`, which imports nothing heavy. The names and the order of the fields are those of
the dictionary's keys (`class_` is the key `class`); the docstring of a class has a line `name: what it is, its unit` for every
field.
"""

import dataclasses
import io
import types
import typing
from dataclasses import dataclass
from typing import Any, Self

from upfit.output import Output


def absent() -> Any:
    """A field that is None where it does not apply, and whose key is then not in the dictionary."""
    return dataclasses.field(default=None, metadata={"absent": True})


def beside() -> Any:
    """A field that is not in the dictionary: what only the text needs."""
    return dataclasses.field(default=None, metadata={"beside": True}, kw_only=True)


def _fields(kind: "type[Part]") -> list[tuple[str, dataclasses.Field[Any], Any]]:
    """Key, field and type of all that is in the dictionary of the dataclass `kind`."""
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if "beside" not in field.metadata]
    return [(field.name.rstrip("_"), field, hints[field.name]) for field in fields]


@dataclass(frozen=True)
class Part:
    """A dictionary inside an answer, as an object."""

    def record(self) -> Any:
        """The dictionary: of plain values, which JSON can hold."""
        values = [(key, getattr(self, field.name), field.metadata) for key, field, _ in _fields(type(self))]
        return {key: _plain(value) for key, value, about in values if value is not None or "absent" not in about}

    @classmethod
    def read(cls, record: dict[str, Any], **beside: Any) -> Self:
        """The object of a dictionary, with the fields that are `beside` it."""
        fields = _fields(cls)
        unknown = record.keys() - {key for key, _, _ in fields}
        assert not unknown, f"{cls.__name__} has no {sorted(unknown)}"
        return cls(**{field.name: _built(kind, record[key]) for key, field, kind in fields if key in record}, **beside)


@dataclass(frozen=True, repr=False)
class Result(Part):
    """The answer of a verb."""

    def show(self, output: Output) -> None:
        """Print it as the command line does."""
        raise NotImplementedError

    def __str__(self) -> str:
        text = io.StringIO()
        self.show(Output(quiet=True, file=text))
        return text.getvalue().rstrip("\n")

    __repr__ = __str__


@dataclass(frozen=True)
class Origin(Part):
    """Where a model came from.

    name: the folder or hub id that was given
    revision: branch, tag or commit of a hub model
    path: the folder that was read; None where it is gone
    """

    name: str
    revision: str | None
    path: str | None


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.record()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _built(kind: Any, value: Any) -> Any:
    """`value` of a dictionary as the annotation `kind` wants it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _built(next(part for part in parts if _fits(part, value)), value)
    if origin is list:
        return [_built(parts[0], item) for item in value]
    if origin is dict:
        return {key: _built(parts[1], item) for key, item in value.items()}
    return kind.read(value) if _is_part(kind) else value


def _fits(kind: Any, value: Any) -> bool:
    if _is_part(kind):
        keys = {key: "absent" in field.metadata for key, field, _ in _fields(kind)}
        return isinstance(value, dict) and {key for key, open in keys.items() if not open} <= value.keys() <= keys.keys()
    plain = typing.get_origin(kind) or kind
    return plain is Any or isinstance(value, {float: int | float, list: list | tuple}.get(plain, plain))


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Part)
