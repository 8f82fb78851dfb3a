"""Which method merged key/value heads: the one that ran, as a step of recipe.json tells it, not the one that was asked for."""

from typing import Any, Literal, get_args

Method = Literal["auto", "aligned", "mean", "first", "random"]
METHOD_RAN = "method_ran"  # where recipe.json keeps what `auto` came to
VERBS = ("convert gqa", "convert mqa")
AUTO = "auto"
METHODS = tuple(name for name in get_args(Method) if name != AUTO)


def method_ran(step: dict[str, Any]) -> str | None:
    """One of METHODS; None for a step that merged no heads or does not say how.

    Steps that are older than METHOD_RAN say what was asked for, and of `auto` what was measured: an alignment has the text that
    it was made on.
    """
    measured = step["measurements"]
    if step["verb"] not in VERBS or measured.get("lossless"):
        return None
    name = measured.get(METHOD_RAN, step.get("options", {}).get("method"))
    if name == AUTO:
        name = "mean" if "not_aligned" in measured else "aligned" if "calibration" in measured else None
    return name if name in METHODS else None
