"""Removes paths of this machine from files that are sent: settings, records of training, a README.

In these files most of what begins with a slash is no path (a token, a template, an example). So text is searched only for known
paths, file:// addresses, and paths below the folders where people keep their files.
"""

import json
import re
from pathlib import Path
from typing import Any

from upfit.bounded import CARD_BYTES, LINES_BYTES, RECORD_BYTES, read_json, read_lines, read_text
from upfit.checkpoint.safetensors_header import read_metadata
from upfit.errors import UpfitError
from upfit.output import to_json
from upfit.portable import FILE_ADDRESS, PART, name_of, place_name, without
from upfit.portable import commit_of as commit_of
from upfit.portable import known_places as known_places
from upfit.portable import portable as portable

# Where people's files lie on the systems that models are made on.
ROOTS = (
    "home|root|Users|tmp|var|private|mnt|media|srv|opt|scratch|workspace|work|Volumes|nfs|gpfs|lustre|content|kaggle|cluster"
    "|storage|fsx|dbfs"
)
BELOW = re.compile(rf"(?<![\w./])/(?:{ROOTS})(?:/{PART})+/?")
BELOW_WINDOWS = re.compile(
    r"""(?<!\w)[A-Za-z]:[\\/]+(?:Users|Documents and Settings|home|tmp|temp|data)[\\/][^\s'",;)\]<>]*""", re.I
)
AT_HOME = re.compile(rf"(?<![\w./~])~[\w.\-]*(?:/{PART})+")
PLACES = re.compile(r"(^|_)(path|file|dir|folder|name_or_path)$")  # keys of settings
METRICS = "metrics.jsonl"
SETTINGS = ("config.json", "special_tokens_map.json")  # how their names end
TEXTS = (".txt", ".md", ".jinja", "")  # endings of licences and templates
VOCABULARIES = re.compile(r"(tokenizer\.json|added_tokens\.json|vocab.*|merges.*|.*\.model|.*\.tiktoken|tekken\.json)$")


def words(text: str, places: list[str]) -> str:
    """Text that somebody wrote, without the places of a machine."""
    text = FILE_ADDRESS.sub(lambda match: name_of(match[0]), without(text, places))
    text = BELOW.sub(lambda match: name_of(match[0]), text)
    text = BELOW_WINDOWS.sub(lambda match: name_of(match[0].replace("/", "\\")), text)
    return AT_HOME.sub(lambda match: name_of(match[0]), text)


def settings(value: Any, places: list[str], key: str = "") -> Any:
    """A config, of any depth: keys that name places keep a last name (hub ids stay), other text is searched."""
    if isinstance(value, dict):
        return {words(str(name), places): settings(part, places, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [settings(part, places, key) for part in value]
    if not isinstance(value, str):
        return value
    return words(place_name(value, places, False) if PLACES.search(key) else value, places)


def sent(name: str, path: Path, places: list[str]) -> bytes | None:
    """What is sent of the file `path` in its stead; None where it goes as it is.

    Raises UpfitError where weights tell of a place: their headers are not written anew.
    """
    if name.endswith(".safetensors"):
        _check_header(path, places)
        return None
    if VOCABULARIES.search(name):  # a token may be anything
        return None
    if name == METRICS:
        return _metrics(path, places)
    if name.endswith((".safetensors.index.json", *SETTINGS)):
        content = read_json(path, 2 * RECORD_BYTES)
        index = name.endswith(".index.json")  # names of tensors are none of ours to change
        cleaned = content | {"metadata": settings(content.get("metadata"), places)} if index else settings(content, places)
        return None if cleaned == content else (to_json(cleaned) + "\n").encode()
    if path.suffix in TEXTS and path.stat().st_size <= CARD_BYTES:
        text = read_text(path, CARD_BYTES)
        return None if words(text, places) == text else words(text, places).encode()
    return None


def _check_header(path: Path, places: list[str]) -> None:
    for key, value in read_metadata(path).items():
        if words(value, places) != value:
            raise UpfitError(f"the header of {path.name} tells of a place on this machine ({key}); save the weights again")


def _metrics(path: Path, places: list[str]) -> bytes | None:
    """The lines of training, each as it is unless something in it is a path."""
    changed, lines = False, list[str]()
    for line in read_lines(path, LINES_BYTES):
        cleaned = line
        if "/" in line or "\\" in line or "~" in line:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UpfitError(f"{path} is not what `upfit uptrain` writes; remove it to publish without it") from error
            cut = portable(content, places)
            cleaned = line if cut == content else json.dumps(cut, ensure_ascii=True)
        changed = changed or cleaned != line
        lines.append(cleaned)
    return "".join(f"{line}\n" for line in lines).encode() if changed else None
