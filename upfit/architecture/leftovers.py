"""Tensors of a checkpoint that its class does not take, such as prediction layers beyond `num_hidden_layers`, old buffers or
scales.

Serving engines may read them, so none may keep the old head counts beside a config with new ones. A layer that looks like one
of the class's own is converted by the same rules. Whatever else depends on heads is left out, and the config says so. The rest
is passed on as it is. Pure: names and shapes in, a plan out.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from upfit.architecture.attention import Layer
from upfit.checkpoint.plan import Plan, Rule
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.architecture.layers import Architecture
    from upfit.architecture.table import Described, Entry

Shape = tuple[int, ...]
PREDICTION = re.compile(r"mtp|nextn", re.IGNORECASE)  # multi-token prediction, as modules and config keys are called
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
NORM = re.compile(r"norm|(^|_)ln(_|$)", re.IGNORECASE)  # `post_attention_layernorm` is as wide as the model, whatever the heads
COUNT = re.compile(r"num|layers|modules|depth", re.IGNORECASE)
PROJECTIONS = ("q.weight", "k.weight", "v.weight", "o.weight")
SHOWN = 3


@dataclass(frozen=True)
class Leftovers:
    """What became of them, by name. `converted` pairs each with the tensor of the class's own layer that it is like; "" for one
    that those layers do not have. `blocks` are those of the left out that were whole layers or modules of their own."""

    converted: Mapping[str, str] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    passed_on: frozenset[str] = frozenset()
    blocks: tuple[str, ...] = ()

    def record(self) -> dict[str, dict[str, int]]:
        """For recipe.json: patterns of names with how many each stands for, by what became of them."""
        kinds = {"converted": self.converted, "left_out": self.left_out, "passed_on": self.passed_on}
        return {kind: patterns(names) for kind, names in kinds.items() if names}

    def notes(self) -> tuple[str, ...]:
        notes = {
            "changed as in its own layers": self.converted,
            "left out, for the model's heads are other ones now": self.left_out,
            "passed on as they are": self.passed_on,
        }
        return tuple(f"tensors that the class does not take, {what}: {_many(names)}" for what, names in notes.items() if names)


def left_over(tensors: Iterable[str], module_name: Callable[[str], str], shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The tensors of a file that become no parameter of its class."""
    return frozenset(name for name in tensors if module_name(name) not in shapes)


def settle(
    plan: Plan,
    unused: frozenset[str],
    tensors: "Mapping[str, Described]",
    architecture: "Architecture",
    changed: list[Layer],
    replan: "Callable[[Architecture], Plan] | None",
) -> tuple[Plan, Leftovers]:
    """`plan` with rules for the `unused` of `tensors`, and its config where layers were left out.

    `changed` are the layers whose shapes change. `replan` makes a plan of an architecture with more layers; None where layers
    that nobody watched cannot be converted.
    """
    used = {name for name in tensors if name not in unused}
    if not changed or not unused:
        return plan, Leftovers(passed_on=unused)
    heads = Heads(architecture, changed, used, tensors)
    twins = heads.twins(unused)
    offending = {name for name in unused if heads.depends(name, [twin.stem for twin, _ in twins])}
    rules, converted = _rules(twins, offending, plan, architecture, replan, heads)
    rest = offending - converted.keys()
    blocks = {heads.block(name) for name in rest if not heads.own(name, converted)}
    blocks |= _of_prediction(unused, blocks)
    strays = {heads.module(name) for name in rest}
    left_out = frozenset(name for name in unused - converted.keys() if _below(name, blocks | strays))
    config = without_prediction(plan.config) if blocks else plan.config
    drop = (Rule((), (), lambda tensors: {}, "left out", tuple(sorted(left_out))),) if left_out else ()
    settled = replace(plan, rules=(*plan.rules, *rules, *drop), config=config)
    return settled, Leftovers(converted, left_out, unused - converted.keys() - left_out, tuple(sorted(blocks)))


def _rules(
    twins: list[tuple[Layer, Layer]],
    offending: set[str],
    plan: Plan,
    architecture: "Architecture",
    replan: "Callable[[Architecture], Plan] | None",
    heads: "Heads",
) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """The rules that convert layers beyond the class's own, and the tensors of those layers, each with the one it is like.

    A block with other attention beside is not converted: half of it would be of the old shape.
    """
    stems = tuple(twin.stem for twin, _ in twins)
    odd = {heads.block(name) for name in offending if not name.startswith(stems)} if stems else set()
    twins = [(twin, layer) for twin, layer in twins if heads.block(twin.names["k.weight"]) not in odd]
    if replan is None or not twins:
        return (), {}
    try:
        more = replan(replace(architecture, layers=(*architecture.layers, *(twin for twin, _ in twins))))
    except UpfitError:
        return (), {}
    like = {name: layer.names.get(part, "") for twin, layer in twins for part, name in twin.names.items()}
    rules = tuple(rule for rule in more.rules if like.keys() & {*rule.reads, *rule.writes})
    if more.config != plan.config or any(set(rule.writes) - like.keys() or rule.drops for rule in rules):
        return (), {}
    return rules, like


class Heads:
    """What a tensor must look like to depend on the heads of the `changed` layers. The class takes the tensors `used`."""

    def __init__(
        self, architecture: "Architecture", changed: list[Layer], used: set[str], tensors: "Mapping[str, Described]"
    ) -> None:
        self.entry, self.layers, self.tensors = architecture.entry, changed, tensors
        self.prefixes = {prefix for name in used for prefix in _prefixes(name)}
        self.modules = {layer.stem.rstrip(".").rpartition(".")[2] for layer in architecture.layers}
        self.stems = tuple(layer.stem for layer in architecture.layers)
        self.wide = {size for layer in changed for size in _widths(layer)} - {1}
        self.few = {count for layer in changed for count in (layer.geometry.heads, layer.geometry.kv_heads)} - {1}
        keys = [tensors[layer.names["k.weight"]].shape for layer in changed if layer.names.get("k.weight") in tensors]
        self.hidden = {shape[-1] for shape in keys}
        others = {_pattern(stem) for name in used for stem in [self._stem(name)] if stem}
        self.other = others - {_pattern(stem) for stem in self.stems}  # attention that this conversion leaves as it is

    def depends(self, name: str, twins: list[str]) -> bool:
        stem, shape = self._stem(name), self.tensors[name].shape
        if not stem or _pattern(stem) in self.other:
            return False
        if name.startswith((*self.stems, *twins)):
            return bool((self.wide | self.few).intersection(shape))
        if len(shape) < 2:
            return bool(self.wide.intersection(shape))
        rest = [size for size in shape if size not in self.wide]
        return len(rest) < len(shape) and all(size % factor == 0 for size in rest for factor in self.hidden)

    def twins(self, unused: frozenset[str]) -> list[tuple[Layer, Layer]]:
        """Layers among the unused, each with one that is changed and has the same names and shapes."""
        pairs: dict[str, tuple[Layer, Layer]] = {}
        for layer in self.layers:
            for name in sorted(unused):
                stem = name.removesuffix(f"{self.entry.k}.weight")
                alike = stem != name and self._stem(name) == stem and _pattern(stem) not in self.other
                twin = _twin(layer, stem, self.entry, unused, self.tensors, len(pairs)) if alike else None
                if twin is not None:
                    pairs.setdefault(stem, (twin, layer))
        return list(pairs.values())

    def block(self, name: str) -> str:
        """The outermost module around a tensor that holds nothing the class takes; the tensor itself where there is none."""
        return next((prefix for prefix in _prefixes(name) if prefix not in self.prefixes), name)

    def own(self, name: str, converted: Iterable[str]) -> bool:
        """Whether it lies in an attention that stays: the class's own, or one that is converted."""
        return name.startswith(self.stems) or any(self._stem(other) == self._stem(name) for other in converted)

    def module(self, name: str) -> str:
        """The module of an attention that a stray tensor belongs to, such as a key projection; the tensor itself of none."""
        stem = self._stem(name)
        module, dot, _ = name.removeprefix(stem).partition(".")
        return f"{stem}{module}." if dot else name

    def _stem(self, name: str) -> str:
        """The name up to its innermost attention module; empty for a tensor outside of any."""
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if parts[end - 1] in self.modules or (ATTENTION.search(parts[end - 1]) and not NORM.search(parts[end - 1])):
                return ".".join(parts[:end]) + "."
        return ""


def _twin(
    layer: Layer, stem: str, entry: "Entry", unused: frozenset[str], tensors: "Mapping[str, Described]", more: int
) -> Layer | None:
    """The layer at `stem` as one like `layer`; None where it has other shapes."""
    modules = {"q": entry.q, "k": entry.k, "v": entry.v, "o": entry.o, "q_norm": entry.q_norm, "k_norm": entry.k_norm}
    wanted = {f"{part}.{kind}": f"{stem}{module}.{kind}" for part, module in modules.items() for kind in ("weight", "bias")}
    names = {part: name for part, name in wanted.items() if name in unused}
    same = all(tensors[names[part]].shape == tensors[name].shape for part, name in layer.names.items() if part in names)
    if not same or any(part in layer.names and part not in names for part in PROJECTIONS):
        return None
    return replace(layer, index=layer.index + 1 + more, names=names, stem=stem)  # where it would be, the class has nothing


def _widths(layer: Layer) -> set[int]:
    """Rows of everything that is stored head by head, alone or fused."""
    shape = layer.geometry
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    o, v = shape.heads * shape.v_head_dim, shape.kv_heads * shape.v_head_dim
    return {q, k, o, v, 2 * q, k + v, q + k + v, q + k + v + o}


def _prefixes(name: str) -> list[str]:
    """`a.b.c` → `a.`, `a.b.`"""
    parts = name.split(".")
    return [".".join(parts[:end]) + "." for end in range(1, len(parts))]


def _below(name: str, places: set[str]) -> bool:
    return name in places or any(prefix in places for prefix in _prefixes(name))


def _of_prediction(unused: frozenset[str], blocks: set[str]) -> set[str]:
    """What else belongs to prediction layers, once some of them are left out (`mtp_block.0` with `mtp_norm`)."""
    if not any(PREDICTION.search(block) for block in blocks):
        return set()
    return {prefix for name in unused for prefix in (*_prefixes(name), name) if PREDICTION.search(prefix)}


def without_prediction(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of the config, with those nested in it, that tells of no prediction layers: their counts are 0, their switches
    off."""
    changed = {key: without_prediction(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key, value in changed.items():
        if PREDICTION.search(key) and isinstance(value, bool):
            changed[key] = False
        elif PREDICTION.search(key) and COUNT.search(key) and isinstance(value, int):
            changed[key] = 0
    return changed


def patterns(names: Iterable[str]) -> dict[str, int]:
    """Names with how many tensors each stands for: those that differ by numbers alone are one, with `*` for the numbers."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_pattern(name), []).append(name)
    return dict(sorted((kind if len(same) > 1 else same[0], len(same)) for kind, same in alike.items()))


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _many(names: Collection[str]) -> str:
    kinds = list(patterns(names))
    more = f" and others, {len(names)} in all" if len(kinds) > SHOWN else ""
    return ", ".join(kinds[:SHOWN]) + more
