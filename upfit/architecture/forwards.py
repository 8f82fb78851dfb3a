"""Names of arguments and results of transformers' forwards that we rely on.

transformers renames such things between versions (5.24 calls `cache` what was `past_key_values`). A wrong name is no error: a
forward takes any keyword and ignores it. So such names stand here and, for the code inside checkpoints, in
`modeling/upfit_base.py`. `tests/test_forwards.py` looks for each of them in the installed version.
"""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from upfit.errors import UpfitError
from upfit.modeling.upfit_base import CACHE_NAMES, cache_among

__all__ = ["ADVICE", "CACHE_NAMES", "LOGITS_TO_KEEP", "POSITIONS", "cache_name", "cache_of", "takes"]

ADVICE = "install another version of transformers, or leave out --speed and the probes that read on from a cache"

LOGITS_TO_KEEP = "logits_to_keep"  # of how many last tokens, or at which places, logits are made
POSITIONS = "position_ids"


def takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether `forward` has an argument of this name of its own."""
    return name in inspect.signature(forward).parameters


def cache_name(forward: Callable[..., Any]) -> str:
    """The name by which `forward` takes a cache. Raises UpfitError where it takes none by a name that we know."""
    taken = inspect.signature(forward).parameters
    for name in CACHE_NAMES:
        if name in taken:
            return name
    raise UpfitError(
        f"{forward.__qualname__} of transformers {version('transformers')} takes a cache by none of the names "
        f"{', '.join(CACHE_NAMES)}; {ADVICE}"
    )


def cache_of(output: Any) -> Any:
    """The cache in what a forward or `generate` gave back; None where there is none."""
    return cache_among((), dict(output.items()))
