"""What a conversion will do to named tensors: rules, and a plan that lists them.

No file, no model class and no torch in here; `execute.py` runs a plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Rule:
    """A pure function on named tensors.

    `apply` gets the tensors named in `reads` (from the checkpoint, or statistics) and returns exactly those in `writes`. It
    must run on meta tensors too. A tensor that no rule writes passes through untouched, unless a rule lists it in `drops`.
    `label` is what the dry run shows.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    apply: Callable[[Tensors], "dict[str, Tensor]"]
    label: str
    drops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    `config` is the whole new `config.json`. `exact` promises logits equal to the source's bit for bit, `close` equal to
    rounding; verify then demands it. `notes` are shown to the user. `report` goes into recipe.json. `refused_dtypes`: types
    that the weights cannot have, and why.
    """

    config: dict[str, Any]
    rules: tuple[Rule, ...]
    exact: bool = False
    close: bool = False
    notes: tuple[str, ...] = ()
    report: dict[str, Any] | None = None
    refused_dtypes: Mapping[str, str] = field(default_factory=dict)
