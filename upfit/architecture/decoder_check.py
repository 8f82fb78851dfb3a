"""Checks that a model is a decoder whose attention modules can be given a class of ours."""

from typing import TYPE_CHECKING, Any

from upfit.errors import UpfitError

if TYPE_CHECKING:
    from upfit.architecture.layers import Architecture
    from upfit.architecture.table import Entry


def check_decoder(architecture: "Architecture") -> None:
    """Raise UpfitError unless the model is the class that AutoModelForCausalLM gives its type, and one that ours go with."""
    from transformers import AutoModelForCausalLM

    from upfit.architecture.meta_model import auto_class_for

    name = architecture.entry.model_type
    if architecture.entry.own:
        raise UpfitError(
            f"{name} needs a class of ours for grouped heads alone, and cannot have another one beside it; "
            "upfit show MODEL says what it can become"
        )
    if architecture.entry.fused:
        raise UpfitError(f"{name} stores its queries, keys and values in one tensor, which is not supported here")
    if auto_class_for(architecture.config) is not AutoModelForCausalLM:
        raise UpfitError(f"{name} is not loaded by AutoModelForCausalLM; only decoder-only language models can be given this")
    for layer in architecture.layers:
        rows = class_shapes(architecture.config)[f"{layer.path}.{architecture.entry.q}.weight"][0]
        if rows != layer.geometry.heads * layer.geometry.head_dim:
            raise UpfitError(f"{name} stores its queries together with something else, which is not supported here")
        if layer.caches > 1:
            raise UpfitError(f"{name} runs the same attention weights several times, which is not supported here")
        known = {f"{layer.path}.{part}" for part in _known_parts(architecture.entry)}
        beside = layer.path + "."
        strange = [part for part in class_shapes(architecture.config) if part.startswith(beside) and part not in known]
        if strange:
            raise UpfitError(f"{name} has {strange[0]} in its attention, which is not understood; it cannot be given another")


def class_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from upfit.architecture.names import name_map

    return name_map(config).shapes


def auto_map(stem: str) -> dict[str, str]:
    """What `config.json` says of the classes in a modelling file of ours, whose names begin with `stem`."""
    kinds = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {auto: stem + kind for auto, kind in kinds.items()}


def _known_parts(entry: "Entry") -> tuple[str, ...]:
    modules = (entry.q, entry.k, entry.v, entry.o, entry.q_norm, entry.k_norm)
    return (*(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")), "sinks")
