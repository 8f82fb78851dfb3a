"""Checkpoints whose attention keeps one latent a token in its cache, instead of the keys and values of each head (MLA).

They are described, and folded into a stock class where they are of ours; no attention is made of them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from upfit.architecture.attention import Geometry, Layer
from upfit.architecture.names import disk_names, name_map
from upfit.architecture.table import Described
from upfit.checkpoint.safetensors_header import ITEM_BYTES

if TYPE_CHECKING:
    from upfit.architecture.names import NameMap

CACHED = "kv_a_proj_with_mqa.weight"  # DeepSeek's name, and ours: what it gives out is what is cached
OUTPUT = "o_proj"


def is_latent(tensors: Mapping[str, Described]) -> bool:
    return any(name.endswith(f".{CACHED}") for name in tensors)


def latent_layers(config: dict[str, Any], tensors: Mapping[str, Described]) -> tuple[Layer, ...]:
    """The attention layers: one key as wide as what a token adds to the cache, and no value beside it. `names` has the output
    projection alone."""
    names = name_map(config)
    disk = disk_names(names, tensors)
    paths = [name.removesuffix(f".{CACHED}") for name in names.shapes if name.endswith(f".{CACHED}")]
    return tuple(_layer(config, path, index, names, disk, tensors) for index, path in enumerate(paths))


def _layer(
    config: dict[str, Any],
    path: str,
    index: int,
    names: "NameMap",
    disk: dict[str, str],
    tensors: Mapping[str, Described],
) -> Layer:
    settings, stored = config.get("mla") or {}, disk[f"{path}.{CACHED}"]
    output = f"{path}.{settings.get('output', OUTPUT)}.weight"
    heads = settings.get("heads") or config["num_attention_heads"]
    shape = Geometry(heads, 1, names.shapes[f"{path}.{CACHED}"][0], 0)
    itemsize = ITEM_BYTES[tensors[stored].dtype]
    return Layer(path, index, shape, "latent", {"o.weight": disk[output]}, 1, itemsize, stored.removesuffix(CACHED))
