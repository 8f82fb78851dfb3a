"""Tells of every model type of the installed transformers whether and how it can be converted."""

import tomllib
from importlib import resources
from typing import Any

from upfit.architecture.meta_model import AUTO_CLASSES
from upfit.architecture.table import table
from upfit.modeling.registry import code_files

SUPPORTED, OWN, MOVED = "supported", "own class", "retargeted"
NO_LANGUAGE = "transformers has no class for it that writes text"
NOT_LOOKED_AT = "nobody has looked at it yet"


def model_types() -> dict[str, dict[str, Any]]:
    """model type → `how`; `to` what where retargeted, `why` where refused, `merge` which bands an aligned merge of it uses
    (none: its heads are averaged; absent where nobody has watched one); of the table and all others of transformers."""
    from transformers import CONFIG_MAPPING

    known = table()
    listed: dict[str, dict[str, Any]] = {
        name: {"how": OWN if entry.own else SUPPORTED} for name, entry in known.entries.items()
    }
    for name, targets in known.retargets.items():
        listed[name] = {"how": MOVED, "to": [*targets, *([OWN] if name in known.entries else [])]}
    listed |= {name: {"how": "refused", "why": reason} for name, reason in known.refused.items()}
    writing = _writing()
    for name in set(CONFIG_MAPPING) - set(code_files()):
        listed.setdefault(name, {"how": "refused", "why": NOT_LOOKED_AT if name in writing else NO_LANGUAGE})
    for name, bands in watched_bands().items():
        listed[name]["merge"] = bands
    return dict(sorted(listed.items()))


def watched_bands() -> dict[str, list[str]]:
    """Of each model type that was watched, what a merge can do with it (`bands` in `upfit.calibration.traits`)."""
    groups = tomllib.loads(resources.files("upfit.architecture").joinpath("bands.toml").read_text(encoding="utf-8"))["group"]
    return {name: group["bands"] for group in groups for name in group["types"]}


def _writing() -> set[str]:
    """Model types that an auto class of language models loads."""
    import transformers

    # By names alone: asking for the config classes would import every model there is.
    mappings = [getattr(transformers, name)._model_mapping._model_mapping for name in AUTO_CLASSES]
    return {name for mapping in mappings for name in mapping}
