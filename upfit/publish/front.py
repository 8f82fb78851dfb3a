"""The front matter of a model card, which the hub reads. The user's own entries stay, except where the records know better."""

import re
from typing import Any

import yaml

from upfit.errors import UpfitError

FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
MOST = 500_000  # YAML is read slowly
ABOUT_THE_SOURCE = ("base_model", "base_model_relation", "model-index", "model_name", "eval_results")


def split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a README. Raises UpfitError when the front matter is not a YAML mapping."""
    match = FRONT.match(text)
    if match and len(match[1]) > MOST:
        raise UpfitError(f"the front matter of README.md has {len(match[1])} characters; at most {MOST} are read")
    if not match:
        return {}, text
    try:
        settings = yaml.safe_load(match[1]) or {}
        if not isinstance(settings, dict):
            raise ValueError("not a mapping")
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UpfitError(f"the front matter of README.md is not YAML ({reason}); mend it or remove the README") from error
    return settings, text[match.end() :]


def merge(settings: dict[str, Any], facts: dict[str, Any], from_source: bool) -> dict[str, Any]:
    """The user's front matter with ours. `from_source`: it is the source's, so what it says of its own origin and results goes.

    `facts` win, except `license`, which fills a gap, and `tags`, which are added.
    """
    inherited = {key: value for key, value in settings.items() if not (from_source and key in ABOUT_THE_SOURCE)}
    tags = inherited.get("tags") or []
    tags = [str(tag) for tag in tags] if isinstance(tags, list) else [str(tags)]
    merged = inherited | {key: value for key, value in facts.items() if value is not None and key not in ("tags", "license")}
    merged["tags"] = list(dict.fromkeys([*tags, *facts.get("tags", [])]))
    if facts.get("license") and not inherited.get("license"):
        merged["license"] = facts["license"]
    return merged


def dump(front: dict[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"
