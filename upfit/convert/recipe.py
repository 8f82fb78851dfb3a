"""The vocabulary of a conversion: a recipe makes a plan, a plan is a new config and rules, a rule maps named tensors.

No file, no model class and no torch in here: what runs a plan is `planned.py`, what a plan is made for `architecture/layers.py`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.errors import UpfitError
from upfit.output import Output

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.layers import Architecture
    from upfit.checkpoint.reader import Checkpoint

MERGE = "merge"  # the name of recipes that go back to a stock class
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
    rounding; verify then demands it. `notes` are shown to the user. A plan with a `fit` is only an outline: what is written is
    the plan that the fit makes of the checkpoint on calibration text. `report` goes into recipe.json.
    """

    config: dict[str, Any]
    rules: tuple[Rule, ...]
    exact: bool = False
    close: bool = False
    notes: tuple[str, ...] = ()
    fit: "Fit | None" = None
    report: dict[str, Any] | None = None


@dataclass(frozen=True)
class Bench:
    """Where a fit works: the opened source, and `scratch`, a folder of its own for tensors that the rules of its plan will read
    and for what it goes on from after it was stopped; there may be none yet."""

    folder: Path
    checkpoint: "Checkpoint"
    architecture: "Architecture"
    scratch: Path
    output: Output


@dataclass(frozen=True)
class Fit:
    """`run(bench)` gives the plan to be written. `preview(bench)` tells, for a dry run, what calibration predicts, as tables
    that JSON can hold. `fallback` is the plan for a model that cannot be watched on text (None: that is an error);
    `calibrated` says whether the user gave calibration, `otherwise` what to do about that error."""

    run: "Callable[[Bench], Plan]"
    preview: "Callable[[Bench], dict[str, Any]]"
    fallback: "Plan | None"
    calibrated: bool
    otherwise: str = ""


@dataclass(frozen=True)
class Recipe:
    """One attention that a checkpoint can be given.

    `options` is a frozen dataclass whose fields are the command-line flags. `plan(architecture, options)` is pure and raises
    UpfitError for a setting that the checkpoint does not allow. `identity` gives options that must not change the function
    (None where there are none), `trials` a few real settings; the laws in `tests/` run over both.
    """

    name: str
    summary: str
    paper: str
    options: type
    plan: "Callable[[Architecture, Any], Plan]"
    identity: "Callable[[Architecture], Any | None]"
    trials: "Callable[[Architecture], list[Any]]"
    offers: "Callable[[Architecture], str]" = field(default=lambda architecture: "")


def possible(plan: "Callable[[Architecture, Any], Plan]", architecture: "Architecture", options: Any) -> bool:
    """Whether this checkpoint allows these settings."""
    try:
        plan(architecture, options)
    except UpfitError:
        return False
    return True


def find_recipes() -> dict[str, Recipe]:
    """Every recipe, by name: the `RECIPES` in the `recipe` module of each sub-package of `upfit.convert`."""
    import upfit.convert as room

    found = {}
    for module in pkgutil.iter_modules(room.__path__):
        if module.ispkg:
            recipes = importlib.import_module(f"{room.__name__}.{module.name}.recipe").RECIPES
            found.update({recipe.name: recipe for recipe in recipes})
    return dict(sorted(found.items()))


def find_merge(model_type: str) -> Recipe | None:
    """How a checkpoint of one of our model types is folded into a stock class: the `MERGES` of a `recipe` module."""
    import upfit.convert as room

    for module in pkgutil.iter_modules(room.__path__):
        if module.ispkg:
            merges = getattr(importlib.import_module(f"{room.__name__}.{module.name}.recipe"), "MERGES", {})
            if model_type in merges:
                return merges[model_type]
    return None


def get_recipe(name: str) -> Recipe:
    recipes = find_recipes()
    if name not in recipes:
        raise UpfitError(f"no recipe named {name!r}; choose one of {', '.join(recipes)}")
    return recipes[name]
