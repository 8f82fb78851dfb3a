"""What a family can become. This is found by building its class, never by its name."""

from typing import TYPE_CHECKING, Any

from upfit.architecture.decoder_check import auto_map, class_shapes
from upfit.checkpoint.plan import Rule, Tensors
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.layers import Architecture
    from upfit.architecture.table import Entry

MODEL_TYPE = "upfit_diff"


def doubled(architecture: "Architecture") -> dict[str, Any]:
    """`config.json` with twice the query heads.

    Raises UpfitError when, by the shapes of its class, more would change than queries, their norms and sinks, and outputs.
    """
    config, entry = architecture.with_queries_times(2), architecture.entry
    before, after = class_shapes(architecture.config), class_shapes(config)
    known = {f"{layer.path}.{name}" for layer in architecture.layers for name in _shaped_by_queries(entry)}
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    strange = [name for name in changed if name not in known]
    if strange:
        raise UpfitError(
            f"{entry.model_type}: {strange[0]} depends on the number of query heads in a way that is not supported; "
            "try --variant dex, which keeps their number"
        )
    for layer in architecture.layers:
        for module, axis in ((entry.q, 0), (entry.o, 1)):
            name = f"{layer.path}.{module}.weight"
            if after[name][axis] != 2 * before[name][axis]:
                raise UpfitError(
                    f"{entry.model_type} derives its head width from the number of heads, which cannot be doubled; "
                    "try --variant dex, which keeps their number"
                )
    return config


def _shaped_by_queries(entry: "Entry") -> tuple[str, ...]:
    return (f"{entry.q}.weight", f"{entry.q}.bias", f"{entry.q_norm}.weight", f"{entry.o}.weight", "sinks")


def own_config(architecture: "Architecture", config: dict[str, Any], variant: str, lambdas: str) -> dict[str, Any]:
    """`config` as one of ours: what `modeling_upfit_diff.py` reads."""
    entry = architecture.entry
    widths = {layer.geometry.v_head_dim for layer in architecture.layers}
    if len(widths) > 1:
        raise UpfitError(f"{entry.model_type} has heads of widths {sorted(widths)}; only one width is supported here")
    return {
        **config,
        "architectures": ["UpfitDiffForCausalLM"],
        "model_type": MODEL_TYPE,
        "base_model_type": entry.model_type,
        "auto_map": auto_map("modeling_upfit_diff.UpfitDiff"),
        "diff_variant": variant,
        "diff_lambda": lambdas,
        "diff_modules": {"q": entry.q, "o": entry.o},
        "diff_attention_classes": attention_classes(architecture),
        "diff_value_width": widths.pop(),
    }


def attention_classes(architecture: "Architecture") -> list[str]:
    """Names of the classes of this model's attention modules."""
    from upfit.architecture.names import name_map

    classes = name_map(architecture.config).classes
    return sorted({classes[layer.path] for layer in architecture.layers})


def sinks_rule(name: str) -> Rule:
    """An attention sink of each query head, for both heads of its pair."""

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        return {name: tensors[name].repeat_interleave(2, 0)}

    return Rule((name,), (name,), apply, "sinks twice")
