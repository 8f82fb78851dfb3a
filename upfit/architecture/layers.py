"""Where q, k, v and o live for each model type, and the attention layers of one checkpoint in canonical form.

The table is data (`table.toml`). What a checkpoint really contains is then found by building its class on the meta
device twice, with the head counts it has and with others, and looking at which parameters changed shape: config keys can
lie, shapes cannot.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from upfit.architecture.adapter import adapt, adapt_shapes
from upfit.architecture.attention import Geometry, Layer
from upfit.architecture.grouped_class import as_own
from upfit.architecture.latent import is_latent, latent_layers
from upfit.architecture.names import disk_names, name_map
from upfit.architecture.table import Described, Entry, entry_for, family_entry
from upfit.checkpoint.reader import Checkpoint
from upfit.checkpoint.safetensors_header import ITEM_BYTES
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.architecture.names import NameMap


@dataclass(frozen=True)
class Architecture:
    """One checkpoint seen as attention layers."""

    entry: Entry
    config: dict[str, Any]
    layers: tuple[Layer, ...]
    latent: bool = False  # what is cached is one latent a token: to be described, not converted
    tensors: Mapping[str, Described] = field(default_factory=dict, repr=False)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the layers that have most of them."""
        return max(layer.geometry.kv_heads for layer in self.layers)

    @property
    def heads(self) -> int:
        return max(layer.geometry.heads for layer in self.layers)

    def allowed_kv_heads(self) -> list[int]:
        """Every number of key/value heads that all layers can be merged to, ascending; the last changes nothing."""
        counts = {layer.geometry.kv_heads for layer in self.layers}
        if self.entry.kv_heads_flag:
            return sorted({1, *counts})
        candidates = range(self.entry.kv_heads_multiple, max(counts) + 1, self.entry.kv_heads_multiple)
        return [n for n in candidates if all(count % n == 0 for count in counts if count > n)]

    def more_kv_heads(self) -> list[int]:
        """Every larger number of key/value heads that repeated ones can be: of layers that are all alike, the multiples that
        divide the query heads."""
        shapes = {(layer.geometry.heads, layer.geometry.kv_heads) for layer in self.layers}
        if len(shapes) > 1 or self.entry.kv_heads_multiple > 1 or self.entry.own:
            return []
        ((heads, kv_heads),) = shapes
        more = range(2 * kv_heads, heads + 1, kv_heads)
        return [n for n in more if heads % n == 0 and (n == heads or not self.entry.kv_heads_flag)]

    @property
    def latent_numbers(self) -> list[int]:
        """Numbers a token adds to a layer's cache where that is one latent for all heads, for each kind of layer, ascending;
        empty where heads have keys and values of their own."""
        return sorted({layer.geometry.head_dim for layer in self.layers}) if self.latent else []

    @property
    def initializer_range(self) -> float:
        """Standard deviation with which the family draws new weights, 0.02 where the config does not say."""
        text = self.config.get("text_config")
        for part in (text if isinstance(text, dict) else {}, self.config):
            if isinstance(part.get("initializer_range"), int | float):
                return float(part["initializer_range"])
        return 0.02  # what transformers' configs have where a family names none

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes a token adds to the KV cache at batch size 1, in the type of the weights, while every window is open; of an
        encoder-decoder, a token that is written."""
        return sum(layer.kv_bytes_per_token for layer in self.layers if not layer.cross)

    @property
    def cross_bytes_per_position(self) -> int:
        """Bytes that the cross-attention of an encoder-decoder keeps for each position that was read; 0 for a decoder."""
        return sum(layer.kv_bytes_per_token for layer in self.layers if layer.cross)

    def with_kv_heads(self, kv_heads: int) -> dict[str, Any]:
        """`config.json` with every layer kind that has more key/value heads than `kv_heads` reduced to it; where none has as
        many, with that many.

        Of a class that cannot have fewer, it is our own class's, unless nothing changes.
        """
        if self.entry.own and kv_heads >= self.kv_heads:
            return copy.deepcopy(self.config)
        return set_kv_heads(as_own(self.config, self.entry), self.entry, kv_heads, kv_heads > self.kv_heads)

    def with_queries_times(self, factor: int) -> dict[str, Any]:
        """`config.json` with `factor` times the query heads; key/value heads and head width are said outright and stay.

        Whether the class follows is for its shapes to tell.
        """
        changed = copy.deepcopy(self.config)
        for place, key in _counts(changed, self.entry):
            heads = key.replace("key_value", "attention")
            if isinstance(place.get(heads), int):
                place[key] = place.get(key) or place[heads]
                place["head_dim"] = place.get("head_dim") or self.layers[0].geometry.head_dim
                place[heads] *= factor
        return changed


def set_kv_heads(config: dict[str, Any], entry: Entry, kv_heads: int, more: bool = False) -> dict[str, Any]:
    """A copy of `config` that asks for at most (with `more`: for exactly) `kv_heads` key/value heads in every layer; other keys
    stay as they are."""
    changed = copy.deepcopy(config)
    for place, key in _counts(changed, entry):
        if entry.kv_heads_flag:
            place[key] = kv_heads == 1
        elif place.get(key) is None or place[key] > kv_heads or more:
            place[key] = kv_heads
    return changed


def _counts(config: dict[str, Any], entry: Entry) -> list[tuple[dict[str, Any], str]]:
    """(object, key) of every head count in `config`; of those that it does not have, only the main one."""
    settings = []
    for path in entry.kv_heads:
        *parents, key = path.split(".")
        places: list[Any] = [config]
        for parent in parents:
            places = [child for place in places for child in (place.values() if parent == "*" else [place.get(parent)])]
            places = [place for place in places if isinstance(place, dict)]
        settings += [(place, key) for place in places if path == entry.kv_heads[0] or place.get(key) is not None]
    return settings


def open_model(checkpoint: Checkpoint, own: bool = False) -> tuple[Checkpoint, Architecture]:
    """The checkpoint as recipes want it, and its attention layers. For `own` and errors see `bind`."""
    if is_latent(checkpoint.tensors):
        return checkpoint, bind(checkpoint.config, checkpoint.tensors)
    adapted = adapt(checkpoint, own)
    return adapted, _architecture(adapted.config, adapted.tensors)


def bind(config: dict[str, Any], tensors: Mapping[str, "Described"], own: bool = False) -> Architecture:
    """The attention layers of a checkpoint with this config and these tensors; with `own`, of its own family even where it is
    usually seen as another's.

    Raises UpfitError for an unsupported model type, and when the tensors are not what the class wants.
    """
    if is_latent(tensors):
        return Architecture(family_entry(config), config, latent_layers(config, tensors), True, tensors)
    return _architecture(*adapt_shapes(config, tensors, own))


def _architecture(config: dict[str, Any], tensors: Mapping[str, "Described"]) -> Architecture:
    entry = entry_for(config)
    names = name_map(config)
    probe = _probe(config, entry)
    disk = disk_names(names, tensors)
    paths = _attention_paths(entry, names, probe.shapes)
    stored = [path for path in paths if _is_stored(entry, path, disk, names)]
    if not stored:
        raise UpfitError(f"this {entry.model_type} checkpoint has no layer with key/value heads of its own; nothing to convert")
    layers = [_layer(entry, path, index, names, probe, disk, tensors) for index, path in enumerate(stored)]
    first = {layer.block: layer for layer in reversed(layers)}
    # Of two attentions in one layer the second one looks at what an encoder gave.
    layers = [replace(layer, cross=layer is not first[layer.block]) for layer in layers]
    return Architecture(entry, config, tuple(layers), tensors=tensors)


@dataclass(frozen=True)
class Probe:
    """Parameter shapes of the class with other key/value head counts; `counts` pairs (head count now, in the probe)."""

    shapes: dict[str, tuple[int, ...]]
    counts: tuple[tuple[int | None, int], ...]


def _probe(config: dict[str, Any], entry: Entry) -> Probe:
    """Build the class with every head count set to 1 (2 where it is 1), or to 2 and 4 where the class wants even counts."""

    failure: UpfitError | None = None
    for small, other in ((1, 2), (2, 4)):
        changed, counts = as_own(config, entry), []
        for place, key in _counts(changed, entry):
            current = place.get(key)
            place[key] = not current if entry.kv_heads_flag else other if current == small else small
            counts.append((current, place[key]))
        try:
            shapes = name_map(changed).shapes
        except UpfitError as error:
            failure = error
            continue
        return Probe(shapes, tuple(counts))
    assert failure is not None
    raise failure


def _attention_paths(entry: Entry, names: "NameMap", probed: dict[str, tuple[int, ...]]) -> list[str]:
    """Module paths of the attention layers, found by their key projection changing shape with the head count.

    Raises UpfitError when a parameter changes that no part of the table explains: the layer is then not understood.
    """
    shapes = names.shapes
    changed = [name for name in shapes if shapes[name] != probed.get(name)] + [name for name in probed if name not in shapes]
    suffix = f".{entry.k}.weight"
    paths = [name.removesuffix(suffix) for name in changed if name.endswith(suffix)]
    known = {f"{path}.{module}.{kind}" for path in paths for module in (entry.k, entry.v, entry.k_norm) for kind in KINDS}
    strange = [name for name in changed if name not in known | names.added]
    if strange:
        raise UpfitError(
            f"{entry.model_type}: {strange[0]} depends on the number of key/value heads in a way that is not supported; "
            "this configuration cannot be converted"
        )
    return paths


KINDS = ("weight", "bias")
SINKS = "sinks"  # what transformers calls a learned attention sink for each query head


def _is_stored(entry: Entry, path: str, disk: dict[str, str], names: "NameMap") -> bool:
    """False for a layer that only repeats another one's weights (tied blocks are stored once).

    Raises UpfitError when the weights are nowhere.
    """
    wanted = f"{path}.{entry.k}.weight"
    if wanted in disk:
        return True
    if any(other in disk for other in names.tied.get(wanted, ())):
        return False
    raise UpfitError(f"the checkpoint has no tensor of shape {list(names.shapes[wanted])} for {wanted}; fetch it again")


def _layer(
    entry: Entry,
    path: str,
    index: int,
    names: "NameMap",
    probe: Probe,
    disk: dict[str, str],
    tensors: Mapping[str, "Described"],
) -> Layer:
    modules = {"q": entry.q, "k": entry.k, "v": entry.v, "o": entry.o, "q_norm": entry.q_norm, "k_norm": entry.k_norm}
    shapes, stored = names.shapes, {}
    for part, module in modules.items():
        for kind in KINDS:
            name = f"{path}.{module}.{kind}"
            if name in disk:
                stored[f"{part}.{kind}"] = disk[name]
            elif name in shapes and part in ("q", "k", "v", "o"):
                raise UpfitError(f"the checkpoint has no tensor of shape {list(shapes[name])} for {name}; fetch it again")
    if f"{path}.{SINKS}" in disk:
        stored[SINKS] = disk[f"{path}.{SINKS}"]
    fused = names.fused.get(f"{path}.{entry.fused}")
    if fused is not None:
        head_dim, kv_heads, v_head_dim = fused.head_dim, fused.kv_heads, fused.head_dim
    else:
        head_dim, kv_heads = _head_dim(f"{path}.{entry.k}.weight", shapes, probe)
        values = f"{path}.{entry.v}.weight"  # Gemma 4's wide layers have none: their values are the keys
        v_head_dim = _head_dim(values, shapes, probe)[0] if values in shapes else head_dim
    heads = shapes[f"{path}.{entry.o}.weight"][1] // v_head_dim
    key, norm = f"{path}.{entry.k}.weight", stored.get("k_norm.weight")
    layout = "separate-head-norms" if norm and len(tensors[norm].shape) == 2 else entry.layout
    if fused is None and shapes[f"{path}.{entry.q}.weight"][0] == 2 * heads * head_dim:
        layout = "gated-queries"
    caches = len(names.tied.get(key, (key,)))
    itemsize = ITEM_BYTES[tensors[disk[key]].dtype]
    stem = stored["q.weight"].removesuffix(f"{entry.q}.weight")
    beside = sum(shapes[name][0] for name in names.cached if name.startswith(f"{path}."))
    geometry = Geometry(heads, kv_heads, head_dim, v_head_dim)
    return Layer(path, index, geometry, layout, stored, caches, itemsize, stem, beside)


def _head_dim(name: str, shapes: dict[str, tuple[int, ...]], probe: Probe) -> tuple[int, int]:
    """(head width, heads) of a projection, from its rows now and in the probe."""
    rows, probed_rows = shapes[name][0], probe.shapes[name][0]
    for now, probed in probe.counts:
        width = probed_rows // probed
        if width * probed == probed_rows and rows % width == 0 and now in (None, rows // width):
            return width, rows // width
    raise UpfitError(f"{name} has {rows} rows, which no key/value head count of config.json explains; check config.json")
