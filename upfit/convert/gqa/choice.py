"""The options of an aligned merge, and the statistics that it uses."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upfit.calibration.sample import is_statistics
from upfit.calibration.statistics_file import Statistics, open_statistics
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.convert.recipe import FitContext


@dataclass(frozen=True)
class Choice:
    """What the user asked for. `calibration` names text, or one statistics file, or nothing."""

    kv_heads: int
    refit: bool
    calibration: list[str] | None
    tokens: str | None
    length: int | None
    field: str


def statistics_for(context: "FitContext", choice: Choice) -> Statistics | None:
    """The statistics file among `choice.calibration`, opened; None when it names text, or nothing."""
    named = choice.calibration or []
    if not any(map(is_statistics, named)):
        return None
    if len(named) > 1:
        raise UpfitError("--calibration takes text, or one statistics file, not both; give the statistics file alone")
    if choice.tokens is not None or choice.length is not None:
        raise UpfitError(
            "--calibration-tokens and --calibration-length are those of the statistics file; leave them out, or give text"
        )
    return open_statistics(Path(named[0]).expanduser(), context.checkpoint)
