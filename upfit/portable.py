"""Removes paths of this machine from records, so that what is sent or reported does not tell where its maker keeps things.

What is known to be a path, by its key or because it is used as one elsewhere, becomes its last name. Other text is searched for
what looks like an absolute path, a file:// address, or a path through `..`, `.` or `~`.
"""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

WHERE = "path"  # the key of a source that says where its files lie
# Keys whose values are files and folders here, whatever they look like; of the second kind, a hub id may stand there too.
FILES = {"calibration", "data", "files", "folder", "mix", "questions", "responses", "config", "card", "out", "decontaminate"}
FILES |= {"probe_pieces", "task_path", "source"}
MODELS = {"name", "model", "against", "teacher", "tokenizer", "_name_or_path", "name_or_path", "inputs", "texts"}
HUB_ID = re.compile(r"[\w][\w.\-]*/[\w][\w.\-]*([@:][\w.\-/]+)?")
PART = r"""[^\s/'",:;()<>\[\]]+"""
QUOTED = re.compile(r"""(['"])((?:~[\w.\-]*|\.{1,2})?/[^'"\n]*/[^'"\n]*|[A-Za-z]:[\\/][^'"\n]*)\1""")
FILE_ADDRESS = re.compile(r"""\bfile:/[^\s'"<>)\]]*""", re.IGNORECASE)
WINDOWS = re.compile(r"""(?<![\w/])(?:[A-Za-z]:[\\/]|\\\\[^\s\\'"]+\\)[^\s'",;)\]<>]*""")
INSIDE = re.compile(rf"(?<![\w./])(?:~[\w.\-]*|\.{{1,2}})?(?!//)(?:/{PART})+")  # inside a sentence or a list, and no address


def portable(value: Any, places: Iterable[str] = ()) -> Any:
    """`value` (steps of recipe.json, or a part of them) with every path cut to its name; sources lose their `path`.

    Of a hub model the snapshot's commit is kept as `commit`. `places` are absolute paths known besides those of `value`.
    """
    return _portable(value, known_places(value, places))


def known_places(value: Any, places: Iterable[str] = ()) -> list[str]:
    """Absolute paths that stand in `value` as such, `places`, and the folder of this user; the longest first."""
    known = {place.rstrip("/") for place in (*_absolute(value), *places, str(Path.home())) if place.startswith("/")}
    return sorted((place for place in known if place.count("/") > 1 or place == str(Path.home())), key=len, reverse=True)


def _absolute(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _absolute(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _absolute(part)
    elif isinstance(value, str) and value.startswith("/") and "\n" not in value:
        yield from (re.sub(r"=[\d.]+$", "", piece) for piece in re.split(r",(?=/)", value))  # folders of upfit uptrain


def _portable(value: Any, places: list[str], key: str = "") -> Any:
    if isinstance(value, dict):
        portable = {
            _text(str(name), places): _portable(part, places, str(name)) for name, part in value.items() if name != WHERE
        }
        if isinstance(value.get(WHERE), str) and isinstance(value.get("name"), str):
            portable |= _source(value)
        if isinstance(value.get("command"), str):
            portable["command"] = _command(value["command"], places)
        return portable
    if isinstance(value, list | tuple):
        return [_portable(part, places, key) for part in value]
    if not isinstance(value, str):
        return value
    return place_name(value, places, key in FILES) if key in FILES | MODELS else _text(value, places)


def _source(value: dict[str, Any]) -> dict[str, str]:
    """Name and commit of a model that has a place here: a folder is called by its own name, one of the hub by its id."""
    commit = commit_of(value)
    if commit is None:
        return {"name": name_of(value["name"]) or name_of(value[WHERE])}
    return {"name": value["name"], "commit": commit}


def commit_of(source: dict[str, Any]) -> str | None:
    """The commit of a source that came from the hub, as its cache tells; None for a folder."""
    if "commit" in source:
        return str(source["commit"])
    parts = PurePosixPath(str(source.get(WHERE) or "")).parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" else None


def name_of(path: str) -> str:
    """The last part of a path of any system; empty of one that is nothing but dots."""
    parts = [part for part in re.split(r"[\\/]" if "\\" in path else "/", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else ""


def place_name(text: str, places: list[str], file: bool) -> str:
    """A value that is known to name a file or folder, or (where not `file`) perhaps a model of the hub."""
    if "\n" in text or "://" in text or (not file and HUB_ID.fullmatch(text)):
        return _text(text, places)
    if "," in text and "/" in text:  # several, with weights or without
        return ",".join(place_name(piece, places, file) if piece.strip() else piece for piece in text.split(","))
    name, equals, weight = text.rpartition("=") if re.search(r"=[\d.]+$", text) else (text, "", "")
    return f"{(name_of(name) or name) if _is_path(name) else name}{equals}{weight}"


def _is_path(text: str) -> bool:
    return "/" in text or text.startswith("~") or PureWindowsPath(text).drive != "" or text.startswith("\\\\")


def _command(text: str, places: list[str]) -> str:
    try:
        words = shlex.split(text)
    except ValueError:  # not a command of ours
        return _text(text, places)
    return shlex.join(place_name(word, places, False) for word in words)


def _text(text: str, places: list[str]) -> str:
    """Any text: known places by their names, what lies beside them without the way there, then all that looks like a path."""
    if "/" not in text and "\\" not in text:
        return text
    if text.startswith(("/", "~/")) and "\n" not in text and " /" not in text and not re.search(r",\s*/", text):
        return name_of(text) or text
    return searched(without(text, places))


def without(text: str, places: list[str]) -> str:
    """`text` in which `places`, and their folders before anything, are cut to their last names."""
    for place in places:
        if place in text:  # whole: not as the beginning of another name
            text = re.sub(re.escape(place) + r"(?![\w\-])", name_of(place).replace("\\", r"\\"), text)
    for folder in dict.fromkeys(str(PurePosixPath(place).parent) for place in places):
        if folder.count("/") > 1:
            text = text.replace(f"{folder}/", "")
    return text


def searched(text: str) -> str:
    """`text` with all that looks like a path of some machine cut to its last name."""
    text = FILE_ADDRESS.sub(lambda match: name_of(unquote(match[0])), text)
    text = QUOTED.sub(lambda match: match[1] + (name_of(match[2]) or match[2]) + match[1], text)
    text = WINDOWS.sub(lambda match: name_of(match[0].replace("/", "\\")) or match[0], text)
    return INSIDE.sub(lambda match: name_of(match[0]) or match[0], text)
