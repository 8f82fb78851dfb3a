"""Write docs/uptrain-settings.md from the fields of upfit.uptrain.config.Config. A test compares the page with this."""

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from upfit.options import choices, flag, range_words  # noqa: E402
from upfit.uptrain.config import FREE, Config  # noqa: E402

PAGE = ROOT / "docs" / "uptrain-settings.md"
HEAD = """# upfit uptrain: all settings

Written by `scripts/write_settings_page.py` from `upfit/uptrain/config.py`.

A setting is a key of the TOML file that `--config` names. Those that most runs give are flags too, and a flag goes before the
file. A table with the name of a [stage](uptrain.md#stages) holds what that stage alone has, and goes before the rest.
`OUT/uptrain.toml` keeps all settings of a run in this form, and repeats it. From Python they are keywords of
`upfit.api.uptrain`.

```toml
tokens = "50M"
stages = "layerwise=10%,distill"
weight_decay = 0.05
save_every = "30m"

[layerwise]
learning_rate = 2e-3
```

Where *free* is said, a run that is [gone on with](uptrain.md#stopping-and-going-on) may have another value: it changes how the
run is carried out, and not what it computes, but for rounding.

| key | flag | takes | default | meaning |
|---|---|---|---|---|
"""


def page() -> str:
    hints = typing.get_type_hints(Config)
    return HEAD + "".join(_row(field, hints[field.name]) for field in dataclasses.fields(Config))


def _row(field: dataclasses.Field[Any], annotation: Any) -> str:
    spelled = f"`{flag(field.name)}`" if field.metadata["flag"] else ""
    default = "" if field.default is None else f"`{json.dumps(field.default)}`"
    meaning = field.metadata["help"] + (" (*free*)" if field.name in FREE else "")
    return f"| `{field.name}` | {spelled} | {_takes(field, annotation)} | {default} | {meaning} |\n"


def _takes(field: dataclasses.Field[Any], annotation: Any) -> str:
    """What the value may be, in the words of the message that refuses another one."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] or [annotation]
    allowed = next((found for kind in (annotation, *kinds) if (found := choices(kind))), None)
    if allowed:
        return ", ".join(f"`{json.dumps(value)}`" for value in allowed)
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    words = range_words(field.metadata)
    return f"{names[kinds[0]]}{', ' * bool(words)}{words.removeprefix('a number ')}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
