"""What a recipe is: it makes a plan of a new config and rules, or says how to find such a plan on text.

No model class and no torch in here. `planned.py` runs a plan; `architecture/layers.py` describes what it is made for.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.checkpoint.plan import Plan
from upfit.errors import UpfitError
from upfit.output import Output

if TYPE_CHECKING:
    from upfit.architecture.attention import Geometry
    from upfit.architecture.layers import Architecture
    from upfit.calibration.estimate import Work
    from upfit.checkpoint.reader import Checkpoint
    from upfit.convert.result import Sensitivity

MERGE = "merge"  # the name of recipes that go back to a stock class
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class FitContext:
    """Where a fit works: the opened source, and `scratch`, a folder of its own for tensors that the rules of its plan will read
    and for what it goes on from after it was stopped; there may be none yet."""

    folder: Path
    checkpoint: "Checkpoint"
    architecture: "Architecture"
    scratch: Path
    output: Output


@dataclass(frozen=True)
class Fit:
    """A plan that has to be found by running the model on text.

    `outline` tells what will be written: names, shapes and the config; its rules run on meta tensors alone. `run(context)`
    returns the plan to be written. `fallback(why)` returns the plan for a model that cannot be watched on text; None: that is
    an error. `otherwise` is a setting that needs no text, as words of a command line.

    `preview(context)` predicts, for a dry run, what each number of key/value heads would cost, or whatever else an attention
    can tell (a dictionary of its own, which goes into the answer as it is); None where nothing can be predicted.

    `drawn(context)` is, for a dry run, the outline with what is decided by looking at some text; None where nothing is, or
    where there is no text to look at.

    `work(context)` counts what `run` takes, without running anything; None where nobody has counted it.
    """

    outline: Plan
    run: "Callable[[FitContext], Plan]"
    fallback: Callable[[str], Plan] | None = None
    preview: "Callable[[FitContext], Sensitivity | dict[str, Any]] | None" = None
    otherwise: str = ""
    work: "Callable[[FitContext], Work] | None" = None
    drawn: "Callable[[FitContext], Plan] | None" = None


@dataclass(frozen=True)
class Recipe:
    """One attention that a checkpoint can be given.

    `options` is a frozen dataclass whose fields are the command-line flags. `plan(architecture, options)` is pure, gives a Plan
    or, where it takes text to make one, a Fit, and raises UpfitError for a setting that the checkpoint does not allow.
    `identity` gives options that must not change the function (None where there are none), `trials` a few real settings; the
    laws in `tests/` run over both. `offers` says in `upfit show` what a checkpoint can be given, "" for nothing. `shapes` gives
    head counts and widths of the result, a Geometry for each layer.
    """

    name: str
    summary: str
    paper: str
    options: type
    plan: "Callable[[Architecture, Any], Plan | Fit]"
    identity: "Callable[[Architecture], Any | None]"
    trials: "Callable[[Architecture], list[Any]]"
    offers: "Callable[[Architecture], str]" = field(default=lambda architecture: "")
    shapes: "Callable[[Architecture, Any], list[Geometry]]" = field(
        default=lambda architecture, options: [layer.geometry for layer in architecture.layers]
    )


@dataclass(frozen=True)
class NoOptions:
    """The options of a recipe that has none."""


def outline_of(plan: Plan | Fit) -> Plan:
    """What will be written, as far as it is known without running the model."""
    return plan.outline if isinstance(plan, Fit) else plan


def possible(plan: "Callable[[Architecture, Any], Plan | Fit]", architecture: "Architecture", options: Any) -> bool:
    """Whether this checkpoint allows these settings."""
    try:
        plan(architecture, options)
    except UpfitError:
        return False
    return True


def find_recipes() -> dict[str, Recipe]:
    """Every recipe, by name: the `RECIPES` in the `recipe` module of each sub-package of `upfit.convert`."""
    import upfit.convert as room

    by_name = {}
    for module in pkgutil.iter_modules(room.__path__):
        if module.ispkg:
            recipes = importlib.import_module(f"{room.__name__}.{module.name}.recipe").RECIPES
            by_name.update({recipe.name: recipe for recipe in recipes})
    return dict(sorted(by_name.items()))


def find_merge(model_type: str) -> Recipe | None:
    """How a checkpoint of one of our model types is folded into a stock class: the `MERGES` of a `recipe` module."""
    import upfit.convert as room

    for module in pkgutil.iter_modules(room.__path__):
        if module.ispkg:
            merges = getattr(importlib.import_module(f"{room.__name__}.{module.name}.recipe"), "MERGES", {})
            if model_type in merges:
                return merges[model_type]
    return None


def check_dtype(name: str | None) -> None:
    """Raise UpfitError unless weights can be written in the type `name`; None keeps theirs."""
    if name is not None and name not in DTYPES:
        raise UpfitError(f"--dtype {name!r} is not known; choose one of {', '.join(DTYPES)}")


def get_recipe(name: str) -> Recipe:
    recipes = find_recipes()
    if name not in recipes:
        raise UpfitError(f"no recipe named {name!r}; choose one of {', '.join(recipes)}")
    return recipes[name]
