"""The config of our own class, and what becomes of a layer's tensors in it."""

import sys
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM

from upfit.architecture.decoder_check import auto_map, class_shapes
from upfit.architecture.meta_model import auto_class_for, model_class_for
from upfit.architecture.names import name_map
from upfit.checkpoint.plan import Rule, Tensors
from upfit.convert.mla.sizes import Sizes
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.attention import Layer
    from upfit.architecture.layers import Architecture

MODEL_TYPE = "upfit_mla"
INTERFACE = "eager_attention_forward"  # what a file of transformers has whose classes call its attention interface
PROJECTIONS = ("q", "k", "v")
GONE = (*PROJECTIONS, "q_norm", "k_norm")


def check(architecture: "Architecture") -> None:
    """Raise UpfitError for a model whose attention cannot be given a latent, with the reason."""
    entry, name = architecture.entry, architecture.entry.model_type
    if auto_class_for(architecture.config) is not AutoModelForCausalLM:
        raise UpfitError(f"{name} is not loaded by AutoModelForCausalLM; only decoder-only language models can have a latent")
    if entry.own:
        raise UpfitError(f"{name} needs a class of ours for grouped heads, and cannot have another one beside it")
    if not hasattr(sys.modules[model_class_for(architecture.config).__module__], INTERFACE):
        raise UpfitError(f"{name} does not call transformers' attention interface, which latent attention needs")
    shapes = {(g.heads, g.kv_heads, g.head_dim, g.v_head_dim) for g in (layer.geometry for layer in architecture.layers)}
    if len(shapes) > 1:
        raise UpfitError(f"{name} has layers of different head counts or widths, which are not supported here")
    for layer in architecture.layers:
        _check_layer(architecture, layer)


def _check_layer(architecture: "Architecture", layer: "Layer") -> None:
    entry, name, shapes = architecture.entry, architecture.entry.model_type, class_shapes(architecture.config)
    if layer.caches > 1:
        raise UpfitError(f"{name} runs the same attention weights several times, which is not supported here")
    if shapes[f"{layer.path}.{entry.q}.weight"][0] != layer.geometry.heads * layer.geometry.head_dim:
        raise UpfitError(f"{name} stores its queries together with something else, which is not supported here")
    modules = (entry.q, entry.k, entry.v, entry.o, entry.q_norm, entry.k_norm)
    known = {f"{layer.path}.{part}.{kind}" for part in modules for kind in ("weight", "bias")} | {f"{layer.path}.sinks"}
    strange = [part for part in shapes if part.startswith(f"{layer.path}.") and part not in known]
    if strange:
        raise UpfitError(f"{name} has {strange[0]} in its attention, which is not understood; it cannot be given a latent")


def has_bias(architecture: "Architecture") -> bool:
    """Whether queries, keys or values have biases."""
    return any(f"{part}.bias" in layer.names for layer in architecture.layers for part in PROJECTIONS)


def own_config(architecture: "Architecture", layers: list[dict[str, Any]], scaling: float) -> dict[str, Any]:
    """What `modeling_upfit_mla.py` reads, with these settings of each layer."""
    entry, shape = architecture.entry, architecture.layers[0].geometry
    classes = name_map(architecture.config).classes
    gone = [entry.fused] if entry.fused else [entry.q, entry.k, entry.v]
    return {
        **architecture.config,
        "architectures": ["UpfitMlaForCausalLM"],
        "model_type": MODEL_TYPE,
        "base_model_type": entry.model_type,
        "auto_map": auto_map("modeling_upfit_mla.UpfitMla"),
        "mla": {
            "classes": sorted({classes[layer.path] for layer in architecture.layers}),
            "output": entry.o,
            "dropped": [*gone, *filter(None, (entry.q_norm, entry.k_norm))],
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "v_head_dim": shape.v_head_dim,
            "scaling": scaling,
            "bias": has_bias(architecture),
            "layers": layers,
        },
    }


def written(layer: "Layer", bias: bool) -> tuple[str, ...]:
    """The names of a layer's new tensors."""
    names = ["q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight"]
    names += ["q_proj.bias", "kv_a_proj_with_mqa.bias"] if bias else []
    return tuple(layer.stem + name for name in names)


def dropped(layer: "Layer") -> tuple[str, ...]:
    """The names of those that go away."""
    return tuple(name for part, name in layer.names.items() if part.partition(".")[0] in GONE)


def outline(layer: "Layer", sizes: Sizes, bias: bool, label: str) -> Rule:
    """The shapes of a layer's tensors, for the plan that a dry run shows. Never run on values."""
    shape, slots = layer.geometry, 2 * sizes.slots
    query, names = layer.names["q.weight"], written(layer, bias)

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        if tensors[query].device.type != "meta":
            raise ValueError("a latent is written by its fit")
        width = tensors[query].shape[1]
        rows = (shape.heads * (sizes.unrotated + slots), sizes.latent + slots)
        shapes: list[tuple[int, ...]] = [(rows[0], width), (rows[1], width)]
        shapes.append((shape.kv_heads * (sizes.unrotated + shape.v_head_dim), sizes.latent))
        shapes += [(rows[0],), (rows[1],)] if bias else []
        return {name: tensors[query].new_empty(size) for name, size in zip(names, shapes, strict=True)}

    gone = tuple(name for name in dropped(layer) if name not in names)
    return Rule((query,), names, apply, label, gone)
