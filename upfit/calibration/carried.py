"""Everything that a walk over the layers carries from one to the next, as named tensors that can be saved and restored."""

import json
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from upfit.calibration.observe import Call
from upfit.calibration.teacher_student import PairedBatch

NOTHING = object()


class Carried:
    """The hidden states of some batches, and what layers have put into dictionaries that they were given (keys and values that
    later layers share). Made before the first layer; with `alone` the student's side is not used."""

    def __init__(self, batches: list[PairedBatch], alone: bool) -> None:
        self.batches, self.alone = batches, alone
        sides = [calls for batch in batches for calls in ((batch.calls,) if alone else (batch.calls, batch.student_calls))]
        self.dictionaries = [(shared, dict(shared)) for calls in sides for shared in _dictionaries(calls)]

    def tensors(self) -> dict[str, Tensor] | None:
        """All of it by name; None when a layer left something that is not made of tensors."""
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches):
            tensors[_name("teacher", number)] = batch.teacher
            if not self.alone and batch.student is not batch.teacher:
                tensors[_name("student", number)] = batch.student
        for number, (now, begun) in enumerate(self.dictionaries):
            for key, value in now.items():
                if begun.get(key, NOTHING) is value:
                    continue
                parts = list(enumerate(value)) if isinstance(value, tuple) else [(None, value)]
                if not isinstance(key, str) or not all(isinstance(part, Tensor) for _, part in parts):
                    return None
                tensors |= {_name("left", number, key, at): part for at, part in parts}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, on batches that stand before the first layer."""
        for number, batch in enumerate(self.batches):
            device = batch.teacher.device
            batch.teacher = tensors[_name("teacher", number)].to(device)
            student = tensors.get(_name("student", number))
            batch.student = batch.teacher if student is None else student.to(device)
        parts: dict[tuple[int, str], dict[int | None, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, number, *rest = json.loads(name)
            if kind == "left":
                parts.setdefault((number, rest[0]), {})[rest[1]] = tensor.to(self.batches[0].teacher.device)
        for (number, key), pieces in parts.items():
            whole: Any = pieces[None] if None in pieces else tuple(pieces[at] for at in range(len(pieces)))
            self.dictionaries[number][0][key] = whole


def _name(*words: str | int | None) -> str:
    return json.dumps(words)


def _dictionaries(calls: list[Call]) -> list[MutableMapping[Any, Any]]:
    """Every dictionary that layers are given, once."""
    values = (value for call in calls for value in (*call.arguments, *call.keywords.values()))
    return list({id(value): value for value in values if isinstance(value, MutableMapping)}.values())
