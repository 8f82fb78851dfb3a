"""`recipe.json`: what was done to the model in a folder, one step for each command, oldest first.

Every command that writes a folder copies the steps of the source folder and appends its own. The model card is made from this
file and the uptrainer finds its teacher in it.
"""

import functools
import importlib.metadata
import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from upfit.addresses import redacted
from upfit.bounded import RECORD_BYTES, read_json, shaped
from upfit.durable import write_whole
from upfit.errors import UpfitError
from upfit.output import to_json

FILE = "recipe.json"
FORMAT = 1
METHOD_RAN = "method_ran"  # among the measurements of a conversion: what `auto` came to
NOT_ALIGNED = "not_aligned"  # why it came to another method than usual
HEAD_ORDER = "head_order"  # of each layer, the numbers that its query heads had before, in the order in which they stand now
STATE = "leaves"  # among them too: in which of these states it leaves a model, as far as uptraining needs to know
LOSSLESS = "lossless"  # nothing to learn from what the model was
FITTED = "fitted"  # near to what it was: to be changed with care
BLIND = "blind"  # far from what it was: its attention was changed without looking at what it does
UNSETTLED = "unsettled"  # lossless, and bound to lose while it is trained
STATES = (LOSSLESS, FITTED, BLIND, UNSETTLED)
MERGES = ("convert gqa", "convert mqa")  # the verbs that merge heads
METHOD_NAME = re.compile(r"[a-z_]{1,32}")
PACKAGES = ("upfit", "torch", "transformers", "accelerate", "safetensors", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, for those that are installed."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps told by `folder/recipe.json`, oldest first; empty when there is none.

    Raises UpfitError when the file is there but is not what Upfit writes.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return []
    with shaped(not_ours(path)):
        content = read_json(path, RECORD_BYTES)
        steps = content["steps"]
        if content["format"] != FORMAT or not isinstance(steps, list):
            raise KeyError("format")
        for entry in steps:
            _check_step(entry)
    return steps


def not_ours(path: Path) -> str:
    """What is said of a recipe file in which something is not what Upfit writes there."""
    return f"{path} is not a recipe file of format {FORMAT}; remove it to start a new one"


def _check_step(entry: Any) -> None:
    """Raise TypeError for a step without a verb, or where what every verb takes for granted is of another type."""
    if not isinstance(entry, dict) or not isinstance(entry.get("verb"), str):
        raise TypeError("a step has no verb")
    kinds = {
        "date": str,
        "command": str,
        "config": dict,
        "source": dict,
        "options": dict,
        "versions": dict,
        "measurements": dict,
    }
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            raise TypeError(f"{key!r} of a step is of another type")
    source = entry.get("source") or {}
    for key in ("name", "revision", "path", "commit"):
        if not isinstance(source.get(key), str | None):
            raise TypeError(f"{key!r} of a source is no text")
    if entry["verb"].startswith("convert") and not isinstance(source.get("name"), str):
        raise TypeError("a conversion has no source")


def step(
    verb: str, source: dict[str, Any], options: dict[str, Any], measurements: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One entry: `source` says where the input came from (path or hub id, revision), `options` every setting in force."""
    return {
        "verb": verb,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "options": public(options),
        "versions": versions(),
        "measurements": measurements or {},
    }


def config_lines(step: dict[str, Any]) -> list[str]:
    """What the config file that a step's command names has to say, where no flag says it, as lines of TOML."""
    config = step.get("config") or {}
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items() if not isinstance(value, dict)]
    tables = [(name, table) for name, table in config.items() if isinstance(table, dict)]
    return lines + [line for name, table in tables for line in (f"[{name}]", *config_lines({"config": table}))]


def public(value: Any) -> Any:
    """Settings as they may be kept: without the passwords of addresses, and without keys."""
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    return redacted(value) if isinstance(value, str) else value


def write(folder: Path, steps: list[dict[str, Any]]) -> None:
    """Write `recipe.json` into a folder that is otherwise finished: the steps, and the files that are Upfit's: all of them."""
    listed = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    _write(folder, sorted({*listed, FILE}), steps)


def _write(folder: Path, listed: list[str] | None, steps: list[dict[str, Any]]) -> None:
    """All of the file or nothing of it, so that a killed `append` loses no earlier step."""
    content = {"format": FORMAT} | ({"files": listed} if listed is not None else {}) | {"steps": steps}
    write_whole(folder / FILE, to_json(content) + "\n")


def files(folder: Path) -> list[str] | None:
    """The names of all files that Upfit has written into `folder`, relative to it; None where its `recipe.json` (of another
    program, or none) does not list them."""
    try:
        steps = read(folder)
        listed = read_json(folder / FILE, RECORD_BYTES).get("files") if steps else None
    except UpfitError:
        return None
    return listed if isinstance(listed, list) and all(isinstance(name, str) for name in listed) else None


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Add a step to a finished folder."""
    _write(folder, files(folder), [*read(folder), entry])


def teacher(folder: Path) -> dict[str, Any] | None:
    """The `source` of the newest conversion in this folder's history: the model as it was before its attention changed."""
    for entry in reversed(read(folder)):
        if entry["verb"].startswith("convert"):
            return {"revision": None, **entry["source"]}
    return None


def patterns(folder: Path) -> set[str]:
    """The patterns of questions that uptraining on long contexts has taught the model in this folder."""
    with shaped(not_ours(folder / FILE)):
        data = [entry.get("data") or {} for entry in read(folder) if entry["verb"] == "uptrain"]
        return {str(name) for item in data for name in item.get("patterns", ())}


def method_ran(entry: dict[str, Any]) -> str | None:
    """How a step merged heads; None for a step that merged none or does not say how.

    Steps that are older than METHOD_RAN say what was asked for, and of `auto` what was measured: an alignment has the text that
    it was made on.
    """
    measured = entry.get("measurements", {})
    if entry["verb"] not in MERGES or measured.get("lossless"):
        return None
    name = measured.get(METHOD_RAN, entry.get("options", {}).get("method"))
    if name == "auto":
        name = "mean" if NOT_ALIGNED in measured else "aligned" if "calibration" in measured else None
    return name if isinstance(name, str) and METHOD_NAME.fullmatch(name) else None


def state_left(entry: dict[str, Any]) -> str | None:
    """One of STATES for a conversion; None where nothing is known, and for every other step."""
    measured = entry.get("measurements", {})
    if not entry["verb"].startswith("convert"):
        return None
    if STATE in measured:
        return measured[STATE] if measured[STATE] in STATES else None
    if measured.get("lossless"):  # of a folder that is older than STATE, like what follows
        return UNSETTLED if entry.get("options", {}).get("drop_rope") else LOSSLESS
    method = method_ran(entry)
    return None if method is None else FITTED if method == "aligned" else BLIND


def head_order(entry: dict[str, Any], heads: list[int]) -> list[list[int]]:
    """What HEAD_ORDER says of a step, for a model with so many query `heads` in each of its layers: as they stood before, for a
    layer of which nothing is said.

    Steps that are older than HEAD_ORDER say which key/value heads share a new one, and their query heads stand together.
    """
    same = [list(range(count)) for count in heads]
    if not entry["verb"].startswith("convert"):
        return same
    measured = entry.get("measurements", {})
    orders = measured.get(HEAD_ORDER, measured.get("layers"))
    if not isinstance(orders, list) or len(orders) != len(heads):
        return same
    if HEAD_ORDER not in measured:
        orders = [_of_groups(row, count) for row, count in zip(orders, heads, strict=True)]
    return [order if _same_numbers(order, unchanged) else unchanged for order, unchanged in zip(orders, same, strict=True)]


def _same_numbers(order: Any, numbers: list[int]) -> bool:
    return isinstance(order, list) and all(isinstance(number, int) for number in order) and sorted(order) == numbers


def _of_groups(row: Any, heads: int) -> list[int]:
    groups = (row.get("groups") if isinstance(row, dict) else None) or []
    share = heads // (sum(map(len, groups)) or 1)  # query heads of one old key/value head
    return [head for group in groups for old in group for head in range(old * share, (old + 1) * share)]
