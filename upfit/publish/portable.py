"""A history without the places of one machine: what goes to the hub must not tell where its maker keeps things."""

import re
import shlex
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

INSIDE = re.compile(r"""(?<![\w.:/])~?(?:/[^\s/'",;)\]]+)+""")  # a path inside a sentence or a list, and no address
WHERE = "path"  # the key of a source that says where its files lie


def portable(value: Any) -> Any:
    """`value` (steps of recipe.json, or a part of them) with every absolute path cut to its name; sources lose their `path`.

    Of a hub model the snapshot's commit is kept as `commit`.
    """
    if isinstance(value, dict):
        kept = {key: portable(part) for key, part in value.items() if key not in (WHERE, "command")}
        if isinstance(value.get(WHERE), str) and "name" in value:
            kept |= _commit(value)
        if isinstance(value.get("command"), str):
            kept["command"] = shlex.join(portable(word) for word in shlex.split(value["command"]))
        return kept
    if isinstance(value, list):
        return [portable(part) for part in value]
    return _name(value) if isinstance(value, str) else value


def commit_of(source: dict[str, Any]) -> str | None:
    """The commit of a source that came from the hub, as its cache tells; None for a folder."""
    if "commit" in source:
        return str(source["commit"])
    parts = PurePosixPath(source.get(WHERE, "")).parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" else None


def _commit(source: dict[str, Any]) -> dict[str, str]:
    commit = commit_of(source)
    return {} if commit is None else {"commit": commit}


def _name(text: str) -> str:
    pieces = text.split(",")
    if len(pieces) > 1 and all(PurePosixPath(piece).is_absolute() for piece in pieces):  # sources of upfit uptrain
        return ",".join(_name(piece) for piece in pieces)
    path: PurePath = PurePosixPath(text)
    if path.is_absolute() or text.startswith("~"):
        return path.name or text
    path = PureWindowsPath(text)
    if path.drive and path.is_absolute():
        return path.name
    return INSIDE.sub(lambda found: found[0].rsplit("/", 1)[-1], text)
