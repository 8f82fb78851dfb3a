"""The plan as far as it is known before any layer is fitted: shapes of the result, and which class it is of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from upfit.architecture.names import name_map
from upfit.checkpoint.plan import Plan
from upfit.convert.mla.deepseek import why_not
from upfit.convert.mla.fit import label, own_note, stock_note
from upfit.convert.mla.own_config import has_bias, outline, own_config
from upfit.convert.mla.pad import padded
from upfit.convert.mla.sizes import Asked, Sizes, layer_settings, possible_sizes
from upfit.convert.mla.stock_plan import stock_plan
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.architecture.layers import Architecture

STOCK, OWN = "deepseek_v3", "upfit_mla"  # classes of results, as --target calls them


@dataclass(frozen=True)
class Outline:
    """Of a model: what becomes of it at some sizes. `pad`: widths that the stock class gets by zeros."""

    architecture: "Architecture"
    pairs: int
    pad: tuple[int, int] | None
    refit: bool

    def own(self, sizes: Sizes) -> Plan:
        """As our class."""
        architecture, bias = self.architecture, has_bias(self.architecture)
        settings, words = layer_settings(sizes, list(range(self.pairs))), label(architecture, sizes, self.refit)
        rules = tuple(outline(layer, sizes, bias, words) for layer in architecture.layers)
        return Plan(own_config(architecture, [settings] * len(rules), 1.0), rules)

    def plan(self, sizes: Sizes, stock: bool, reason: str | None) -> Plan:
        """As the class that was chosen; `reason`: why it is not the stock one."""
        own = self.own(sizes)
        if not stock:
            return replace(own, notes=(own_note(reason),))
        plan = stock_plan(own if self.pad is None else padded(own, self.pad), self.architecture)
        return replace(plan, notes=(stock_note(plan.config),))


@dataclass(frozen=True)
class Target:
    """The class of the result, and what its caches can be spent on. `reason`: why it is not the stock one, if there is one."""

    possible: tuple[Sizes, ...]
    stock: bool
    reason: str | None


def choose_target(drawing: Outline, asked: Asked, target: str) -> Target:
    """The class that was asked for, or with `auto` the stock one where it can hold the model. Raises UpfitError for widths that
    are none, and for a class that cannot hold it."""
    architecture, reason = drawing.architecture, None

    def ways(several: bool) -> tuple[Sizes, ...]:
        first = architecture.layers[0]
        inputs = architecture.tensors[first.names["q.weight"]].shape[1] + has_bias(architecture)
        return tuple(possible_sizes(first.geometry, inputs, drawing.pairs, several, asked))

    possible = ways(target == OWN)
    config = drawing.own(middle(possible)).config
    name_map(config)  # which our class may refuse
    if target != OWN:
        reason = why_not(config)
        if reason is not None and target == STOCK:
            raise UpfitError(f"--target {STOCK}: {reason}; leave it out for a class of ours")
        if reason is not None:
            possible = ways(True)
    stock = target != OWN and reason is None
    if drawing.pad is not None and not stock:
        raise UpfitError(f"--pad is for {STOCK}, and the result is of our class{f': {reason}' if reason else ''}; leave it out")
    return Target(possible, stock, reason)


def middle(possible: Sequence[Sizes]) -> Sizes:
    """The sizes that stand for all while nobody has looked at text."""
    return possible[len(possible) // 2]
