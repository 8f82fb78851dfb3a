"""JSON schemas of what `--json` prints, made from the dataclasses of the answers.

`python -m tests.json_schemas` writes the files that tests/test_api.py holds them against: do that when a change is meant.
"""

import dataclasses
import functools
import json
import operator
import types
import typing
from pathlib import Path
from typing import Any

from upfit.calibration.result import Calibration
from upfit.convert.result import Conversion, Description
from upfit.evaluate.result import Evaluation
from upfit.longcontext.result import Synthesis
from upfit.plan.result import TrainingCost
from upfit.publish.result import Publication
from upfit.report.result import Group, Report
from upfit.results import Part
from upfit.uptrain.data.result import Preparation
from upfit.uptrain.run.result import Uptraining

FOLDER = Path(__file__).parent / "schemas"
ANSWERS: dict[str, Any] = {
    "convert": Conversion,
    "merge": Conversion,
    "calibrate": Calibration,
    "prepare": Preparation,
    "synth": Synthesis,
    "plan": TrainingCost,
    "uptrain": Uptraining,
    "evaluate": Evaluation,
    "report": Report,
    "compare": list[Group],
    "push": Publication | list[Publication],
    "show": Description,
}
PLAIN: dict[Any, dict[str, Any]] = {
    Any: {},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    types.NoneType: {"type": "null"},
}


def schema(answer: Any) -> dict[str, Any]:
    """The schema of an annotation, with one definition for every dataclass in it."""
    definitions: dict[str, Any] = {}
    top = _schema(answer, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": dict(sorted(definitions.items()))}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if origin is list:
        return {"type": "array", "items": _schema(parts[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(parts[1], definitions)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(part, definitions) for part in parts]}
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # a dataclass may be in itself
        definitions[kind.__name__] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _object(kind: type[Part], definitions: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if "beside" not in field.metadata]
    properties, required = {}, []
    for field in fields:
        annotation, key = hints[field.name], field.name.rstrip("_")
        if "absent" in field.metadata:
            annotation = functools.reduce(operator.or_, [p for p in typing.get_args(annotation) if p is not types.NoneType])
        else:
            required.append(key)
        properties[key] = _schema(annotation, definitions)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def main() -> None:
    for verb, answer in ANSWERS.items():
        (FOLDER / f"{verb}.json").write_text(json.dumps(schema(answer), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
