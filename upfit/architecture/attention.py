"""The canonical attention layer, in which architectures and recipes meet, and the layouts that pack it into tensors.

Shapes: H query heads, K key/value heads, D head width of queries and keys, V head width of values, E hidden width.
A recipe sees only `Attention`; how a family stores it is a `Layout`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from upfit.checkpoint.plan import Rule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """One attention layer. A part that the rule did not ask for, or that the layer does not have, is None.

    q [H, D, E], k [K, D, E], v [K, V, E], o [E, H, V]; biases q [H, D], k [K, D], v [K, V], o [E]; norms q_norm [D] or
    [H, D], k_norm [D] or [K, D] (two dimensions where every head has a scale of its own). gate [H, V, E] and gate_bias [H, V]
    make what the attention's output is multiplied with, where the queries' projection gives it out. `extras` holds anything
    else.
    """

    q: "Tensor | None" = None
    k: "Tensor | None" = None
    v: "Tensor | None" = None
    o: "Tensor | None" = None
    q_bias: "Tensor | None" = None
    k_bias: "Tensor | None" = None
    v_bias: "Tensor | None" = None
    o_bias: "Tensor | None" = None
    q_norm: "Tensor | None" = None
    k_norm: "Tensor | None" = None
    gate: "Tensor | None" = None
    gate_bias: "Tensor | None" = None
    extras: "dict[str, Tensor]" = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """Head counts and widths of one layer; `E` is not needed, tensors carry it."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int


class Layout(Protocol):
    """How a family stores a layer. Tensors are named by part: `k.weight`, `k.bias`, `k_norm.weight` ..."""

    def parts(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """The stored parts that hold the canonical fields in `wanted`; a fused tensor brings its neighbours along."""
        ...

    def unpack(self, stored: "Mapping[str, Tensor]", geometry: Geometry) -> Attention: ...

    def pack(self, attention: Attention, geometry: Geometry) -> "dict[str, Tensor]": ...


class Separate:
    """q, k, v and o as projections of their own, stored as Linear weights [out, in] with heads contiguous along `out`."""

    fields = {
        "q": "q.weight",
        "k": "k.weight",
        "v": "v.weight",
        "o": "o.weight",
        "q_bias": "q.bias",
        "k_bias": "k.bias",
        "v_bias": "v.bias",
        "o_bias": "o.bias",
        "q_norm": "q_norm.weight",
        "k_norm": "k_norm.weight",
    }

    def parts(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.fields[name] for name in wanted)

    def unpack(self, stored: "Mapping[str, Tensor]", geometry: Geometry) -> Attention:
        tensors: dict[str, Any] = {name: stored[part] for name, part in self.fields.items() if part in stored}
        widths = {"q": geometry.head_dim, "k": geometry.head_dim, "v": geometry.v_head_dim}
        for name, width in widths.items():
            if name in tensors:
                tensors[name] = tensors[name].unflatten(0, (-1, width))
            if name + "_bias" in tensors:
                tensors[name + "_bias"] = tensors[name + "_bias"].unflatten(0, (-1, width))
        if "o" in tensors:
            tensors["o"] = tensors["o"].unflatten(1, (-1, geometry.v_head_dim))
        for name in ("q_norm", "k_norm"):  # full-width norms hold one scale per head; shared ones stay [D]
            if name in tensors and tensors[name].numel() != geometry.head_dim:
                tensors[name] = tensors[name].reshape(-1, geometry.head_dim)
        return Attention(**tensors)

    def pack(self, attention: Attention, geometry: Geometry) -> "dict[str, Tensor]":
        stored = {}
        for name, part in self.fields.items():
            tensor = getattr(attention, name)
            if tensor is not None:
                stored[part] = tensor.flatten(1) if name == "o" else tensor.flatten(0, 1) if tensor.ndim > 1 else tensor
        return stored


class SeparateHeadNorms(Separate):
    """As `Separate`, with the key norm kept as [K, D] (Cohere): a scale per head, not flattened."""

    def pack(self, attention: Attention, geometry: Geometry) -> "dict[str, Tensor]":
        stored = super().pack(attention, geometry)
        for name in ("q_norm", "k_norm"):
            tensor = getattr(attention, name)
            if tensor is not None:
                stored[self.fields[name]] = tensor
        return stored


class GatedQueries(Separate):
    """As `Separate`, with the rows of each head's queries followed by those of its gate (Qwen3-Next)."""

    def unpack(self, stored: "Mapping[str, Tensor]", geometry: Geometry) -> Attention:
        attention = super().unpack(stored, geometry)
        apart: dict[str, Any] = {}
        for name, gate in (("q", "gate"), ("q_bias", "gate_bias")):
            both = getattr(attention, name)
            if both is not None:
                apart |= {name: both[0::2], gate: both[1::2]}
        return replace(attention, **apart)

    def pack(self, attention: Attention, geometry: Geometry) -> "dict[str, Tensor]":
        import torch

        joined: dict[str, Any] = {}
        for name in ("q", "q_bias"):
            queries, gate = getattr(attention, name), getattr(attention, name.replace("q", "gate"))
            if queries is not None:
                joined[name] = torch.stack((queries, gate), 1).flatten(0, 1)
        return super().pack(replace(attention, **joined), geometry)


LAYOUTS: dict[str, Layout] = {
    "separate": Separate(),
    "separate-head-norms": SeparateHeadNorms(),
    "gated-queries": GatedQueries(),
}


BLOCK = re.compile(r".*?\.\d+\.")  # in a tensor's name, up to the number of the layer of the model


@dataclass(frozen=True)
class Layer:
    """One attention layer of a checkpoint: where it is, what it looks like, and under which names its parts are stored."""

    path: str  # module path in the model class, for people
    index: int
    geometry: Geometry
    layout: str
    names: Mapping[str, str]  # stored part -> tensor name in the checkpoint
    caches: int = 1  # how often the model runs this layer's weights, each time with a cache of its own
    itemsize: int = 2  # bytes an element
    stem: str = ""  # what the names of the module's tensors begin with in the checkpoint
    beside: int = 0  # numbers a token that are cached besides its keys and values
    cross: bool = False  # its keys and values are made of what an encoder gave, once

    @property
    def block(self) -> str:
        """What the names of all tensors in its layer of the model begin with."""
        start = BLOCK.match(self.stem)
        return start[0] if start else self.stem

    @property
    def kv_bytes_per_token(self) -> int:
        shape = self.geometry
        return self.caches * self.itemsize * (shape.kv_heads * (shape.head_dim + shape.v_head_dim) + self.beside)

    def rule(
        self,
        wanted: tuple[str, ...],
        change: "Callable[[Attention], Attention]",
        label: str,
        target: "Layer | None" = None,
    ) -> Rule:
        """A rule that unpacks the `wanted` fields of this layer, changes them, and packs them for `target` (or itself).

        Fields that this layer does not have are left out, so a recipe asks for biases and norms without knowing.
        """
        target = target or self
        source_layout, target_layout = LAYOUTS[self.layout], LAYOUTS[target.layout]
        parts = tuple(dict.fromkeys(part for part in source_layout.parts(wanted) if part in self.names))
        reads = tuple(self.names[part] for part in parts)
        writes = tuple(target.names[part] for part in dict.fromkeys(target_layout.parts(wanted)) if part in target.names)

        def apply(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
            stored = {part: tensors[self.names[part]] for part in parts}
            changed = change(source_layout.unpack(stored, self.geometry))
            packed = target_layout.pack(changed, target.geometry)
            return {target.names[part]: tensor.contiguous() for part, tensor in packed.items()}

        drops = tuple(name for name in reads if name not in writes)
        return Rule(reads, writes, apply, label, drops)
