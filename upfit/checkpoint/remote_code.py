"""Removes references to the source's own modelling code (`auto_map`) from a config: that code is never copied.

With `trust_remote_code`, transformers looks for such code before it looks at its own classes, and would not find it.
"""

import json
from pathlib import Path
from typing import Any

from upfit.modeling.registry import is_own

KEY = "auto_map"
MAX_BYTES = 64 * 2**20  # as `reader.MAX_JSON_BYTES`
ELSEWHERE = "--"  # `org/model--module.Class` is code of another repository, which is found there


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config.json` for a folder without the source's code: only our own classes are named, and only outermost."""

    def stripped(part: dict[str, Any]) -> dict[str, Any]:
        return {key: stripped(value) if isinstance(value, dict) else value for key, value in part.items() if key != KEY}

    return stripped(config) | ({KEY: config[KEY]} if is_own(config) and KEY in config else {})


def side_file(path: Path) -> bytes:
    """The content of a side file as it is to be copied: a tokenizer's or processor's settings without code of the folder."""
    content = path.read_bytes()
    if path.suffix != ".json" or len(content) > MAX_BYTES or KEY.encode() not in content:
        return content
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        return content  # whoever reads it says what is wrong with it
    if not isinstance(settings, dict) or not _local(settings.get(KEY)):
        return content
    rest = {name: value for name, value in settings.items() if name != KEY}
    return (json.dumps(rest, indent=2, ensure_ascii=False) + "\n").encode()


def _local(value: Any) -> bool:
    """Whether an `auto_map` names code of its own folder."""
    if isinstance(value, str):
        return ELSEWHERE not in value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(_local, inside))
