"""Shows a checkpoint as if it were stored otherwise: fused projections as separate ones, or one family as another.

So recipes, fits and calibration need not know how a checkpoint is stored. `written` turns their plan back into tensors as they
are stored. Tensors that nothing changed are copied as bytes, wherever their bytes are the same in both forms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.architecture.fused import PARTS, Fused
from upfit.architecture.meta_model import built_of
from upfit.architecture.names import name_map
from upfit.architecture.retarget.retarget import retarget
from upfit.architecture.table import check_known
from upfit.checkpoint.plan import Plan, Rule
from upfit.checkpoint.reader import Checkpoint, safetensors_dtype, torch_dtype
from upfit.checkpoint.safetensors_header import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch

    from upfit.architecture.table import Described


@dataclass(frozen=True)
class Computed:
    """A seen tensor that `rule` makes of stored ones; it belongs where the stored tensor `beside` lies."""

    dtype: str
    shape: tuple[int, ...]
    rule: Rule
    beside: str


@dataclass(frozen=True)
class Adapter:
    """How stored tensors are seen. `same` names, for seen tensors whose bytes are stored as they are, the stored one;
    `computed` holds the others. `puts` are rules from seen tensors back to stored ones; without any, what is seen is what is
    written. `adapted_because` tells the user of a change of family."""

    config: dict[str, Any]
    same: dict[str, str]
    computed: dict[str, Computed]
    puts: tuple[Rule, ...] = ()
    adapted_because: str = ""

    def shapes(self, tensors: "Mapping[str, Described]") -> "dict[str, Described]":
        """What is seen of stored tensors that are only described."""
        return {seen: tensors[stored] for seen, stored in self.same.items()} | dict(self.computed)

    def written(self, plan: Plan) -> Plan:
        """`plan`, made for what is seen, as rules that write tensors of a file."""
        if self.puts:
            return replace(plan, rules=tuple(_put_back(rule, self.puts) for rule in plan.rules))
        touched = {name for rule in plan.rules for name in (*rule.writes, *rule.drops)}
        left = tuple(name for name in self.computed if name not in touched)
        exact, close = (plan.exact and not left, plan.close or (plan.exact and bool(left)))
        notes = (self.adapted_because, *plan.notes) if self.adapted_because else plan.notes
        rules = tuple(_as_seen(name, self.computed[name].rule.label) for name in left)
        return replace(plan, rules=plan.rules + rules, exact=exact, close=close, notes=notes)


def _as_seen(name: str, label: str) -> Rule:
    return Rule((name,), (name,), dict, label)


def _put_back(rule: Rule, puts: tuple[Rule, ...]) -> Rule:
    """One rule that does what `rule` does and then stores it as `puts` say."""
    mine = tuple(put for put in puts if set(put.reads) & set(rule.writes))
    beside = tuple(name for put in mine for name in put.reads if name not in rule.writes)
    seen = {name for put in puts for name in put.reads}
    plain = tuple(name for name in rule.writes if name not in seen)

    def apply(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        written = rule.apply({name: tensors[name] for name in rule.reads})
        known = {**tensors, **written}
        stored = {name: written[name] for name in plain}
        for put in mine:
            stored |= put.apply({name: known[name] for name in put.reads})
        return stored

    writes = (*plain, *(name for put in mine for name in put.writes))
    gone = [name for put in puts if set(put.reads) <= set(rule.drops) for name in put.writes]
    drops = (*(name for name in rule.drops if name not in seen), *gone)
    return Rule(tuple(dict.fromkeys((*rule.reads, *beside))), writes, apply, rule.label, drops)


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """An opened checkpoint through an adapter."""

    under: Checkpoint = field(kw_only=True)
    adapter: Adapter = field(kw_only=True)
    _last: dict[str, Any] = field(default_factory=dict, repr=False)  # the tensors made last, for their neighbours

    @property
    def stored(self) -> Checkpoint:
        return self.under.stored

    @property
    def nbytes(self) -> int:
        return self.under.nbytes

    @property
    def numel(self) -> int:
        return self.under.numel

    @property
    def passing(self) -> dict[str, TensorInfo]:
        return self.under.passing if self.adapter.puts else self.tensors

    @property
    def adapted_because(self) -> str:
        return self.adapter.adapted_because or self.under.adapted_because

    def written(self, plan: Plan) -> Plan:
        return self.under.written(self.adapter.written(plan))

    def info(self, name: str) -> TensorInfo:
        known = name in self.tensors or name in self.fitted
        return super().info(name) if known else self.under.info(name)

    def files_of(self, name: str) -> set[Path]:
        if name in self.fitted:
            return super().files_of(name)
        computed = self.adapter.computed.get(name)
        stored = computed.rule.reads if computed else (self.adapter.same.get(name, name),)
        return {file for name in stored for file in self.under.files_of(name)}

    def read(self, name: str) -> "torch.Tensor":
        computed = self.adapter.computed.get(name)
        if computed is None:
            stored = self.adapter.same.get(name)
            return super().read(name) if name in self.fitted else self.under.read(stored or name)
        if name not in self._last:
            tensors = computed.rule.apply({stored: self.under.read(stored) for stored in computed.rule.reads})
            self._last.clear()
            self._last.update(tensors)
        return self._last.pop(name)


def adapt(checkpoint: Checkpoint, own: bool = False) -> Checkpoint:
    """The checkpoint as recipes want it: itself, where its family stores what it is. With `own`, as of its own family even
    where another one computes the same."""
    for adapter in find_adapters(checkpoint.config, checkpoint.tensors, own):
        checkpoint = _through(adapter, checkpoint)
    return checkpoint


def adapt_shapes(config: dict[str, Any], tensors: "Mapping[str, Described]", own: bool = False) -> tuple[dict[str, Any], Any]:
    """`adapt`, of tensors that are only described."""
    for adapter in find_adapters(config, tensors, own):
        config, tensors = adapter.config, adapter.shapes(tensors)
    return config, tensors


def find_adapters(config: dict[str, Any], tensors: "Mapping[str, Described]", own: bool) -> list[Adapter]:
    """What a checkpoint has to be seen through, one after the other. Raises UpfitError for an unsupported model type."""
    check_known(config)
    adapters: list[Adapter] = []
    with built_of(len(tensors)):
        for find in (split_fused,) if own else (as_other_family, split_fused):
            adapter = find(config, tensors)
            if adapter is not None:
                adapters.append(adapter)
                config, tensors = adapter.config, adapter.shapes(tensors)
    return adapters


def _through(adapter: Adapter, under: Checkpoint) -> AdaptedCheckpoint:
    tensors = {name: replace(under.tensors[stored], name=name) for name, stored in adapter.same.items()}
    for name, computed in adapter.computed.items():
        place = under.tensors[computed.beside]
        nbytes = math.prod(computed.shape) * ITEM_BYTES[computed.dtype]
        tensors[name] = TensorInfo(name, computed.dtype, computed.shape, place.file, place.start, place.start + nbytes)
    return AdaptedCheckpoint(
        *(under.folder, adapter.config, tensors, under.files, under.fitted, under._descriptors, under._lock, under._identities),
        under=under,
        adapter=adapter,
    )


def make(rules: tuple[Rule, ...], tensors: "Mapping[str, Described]") -> dict[str, Computed]:
    """What `rules` make of stored tensors, found by running them without values."""
    import torch

    computed = {}
    for rule in rules:
        inputs = {n: torch.empty(tensors[n].shape, dtype=torch_dtype(tensors[n].dtype), device="meta") for n in rule.reads}
        for name, tensor in rule.apply(inputs).items():
            computed[name] = Computed(safetensors_dtype(tensor.dtype), tuple(tensor.shape), rule, rule.reads[0])
    return computed


def as_other_family(config: dict[str, Any], tensors: "Mapping[str, Described]") -> Adapter | None:
    """The adapter that shows the model of another family; None where its own can say fewer key/value heads."""
    other = retarget(config, tensors)
    return (
        None
        if other is None
        else Adapter(other.config, other.renames, make(other.rules, tensors), adapted_because=other.adapted_because)
    )


def split_fused(config: dict[str, Any], tensors: "Mapping[str, Described]") -> Adapter | None:
    """The adapter that shows fused queries, keys and values apart, and what is stored transposed as a Linear has it; None where
    nothing is fused."""

    arrangements, turned = name_map(config).fused, name_map(config).turned
    stored = name_map(config, stored=True) if arrangements else None
    gets, puts = [], []
    for name, info in tensors.items():
        if stored is None:
            break
        module, _, kind = stored.module_name(name).rpartition(".")
        if module in arrangements and stored.shapes.get(f"{module}.{kind}") == tuple(info.shape):
            parts = tuple(f"{name.removesuffix(kind)}{part}.{kind}" for part in PARTS)
            gets.append(_get(name, parts, arrangements[module]))
            puts.append(_put(name, parts, arrangements[module]))
        elif stored.module_name(name) in turned:
            gets.append(Rule((name,), (name,), _turned, "turned"))
            puts.append(Rule((name,), (name,), _turned, "turned back"))
    if not gets:
        return None
    fused = {name for rule in gets for name in rule.reads}
    return Adapter(config, {n: n for n in tensors if n not in fused}, make(tuple(gets), tensors), tuple(puts))


def _get(name: str, parts: tuple[str, ...], arrangement: Fused) -> Rule:
    def apply(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        return dict(zip(parts, arrangement.split(tensors[name]), strict=True))

    return Rule((name,), parts, apply, "apart")


def _turned(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    return {name: tensor.T.contiguous() for name, tensor in tensors.items()}


def _put(name: str, parts: tuple[str, ...], arrangement: Fused) -> Rule:
    def apply(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        q, k, v = (tensors[part] for part in parts)
        width = arrangement.head_dim
        now = replace(arrangement, heads=q.shape[0] // width, kv_heads=k.shape[0] // width)
        return {name: now.join(q, k, v)}

    return Rule(parts, (name,), apply, "fused")
