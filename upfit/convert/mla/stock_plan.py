"""A plan for a checkpoint of our class as one that writes the stock class: each of its tensors is made of ours on the way."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from upfit.architecture.latent_scale import FLOAT16
from upfit.architecture.names import name_map
from upfit.architecture.retarget.draft import Draft
from upfit.checkpoint.plan import Plan, Rule
from upfit.convert.mla.deepseek import to_deepseek

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.layers import Architecture


@dataclass(frozen=True)
class Shape:
    """A tensor that is still to be made."""

    shape: tuple[int, ...]
    dtype: str


def stock_plan(plan: Plan, architecture: "Architecture") -> Plan:
    """`plan`, whose config is of our class and whose rules read a checkpoint of `architecture`, for the stock class.

    Raises UpfitError where that cannot hold the model.
    """
    writers = {name: rule for rule in plan.rules for name in rule.writes}
    gone = {name for rule in plan.rules for name in rule.drops}
    described = {name: info for name, info in architecture.tensors.items() if name not in gone}
    shapes = name_map(plan.config).shapes
    for layer in architecture.layers:
        dtype = architecture.tensors[layer.names["o.weight"]].dtype
        for name in (name for name in writers if name.startswith(layer.stem)):
            described[name] = Shape(shapes[f"{layer.path}.{name.removeprefix(layer.stem)}"], dtype)
    draft = Draft(plan.config, described)
    config = to_deepseek(draft)
    rules = [_through(rule, writers) for rule in draft.rules]
    written = {name for rule in rules for name in rule.writes}
    for new, old in draft.renames.items():
        if old in writers or new != old:
            label = writers[old].label if old in writers else "renamed"
            rules.append(_through(Rule((old,), (new,), _renaming(old, new), label), writers))
        written.add(new)
    left = tuple(name for name in architecture.tensors if name not in written)
    first, *rest = rules
    return replace(plan, config=config, refused_dtypes={"float16": FLOAT16}, rules=(replace(first, drops=left), *rest))


def _renaming(old: str, new: str) -> Any:
    def apply(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        return {new: tensors[old]}

    return apply


def _through(rule: Rule, writers: Mapping[str, Rule]) -> Rule:
    """`rule`, of which some reads are written by `writers`, as one that reads what those read."""
    sources = list({id(writers[name]): writers[name] for name in rule.reads if name in writers}.values())
    plain = [name for name in rule.reads if name not in writers]
    reads = dict.fromkeys([*(name for source in sources for name in source.reads), *plain])

    def apply(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        known = {name: tensors[name] for name in plain}
        for source in sources:
            known |= source.apply({name: tensors[name] for name in source.reads})
        return rule.apply(known)

    return Rule(tuple(reads), rule.writes, apply, rule.label)
