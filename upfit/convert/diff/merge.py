"""`upfit merge`: folds what was added and learned into the family's own class."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upfit.checkpoint.plan import Plan, Rule, Tensors
from upfit.convert.diff.family import class_shapes, sinks_rule
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.attention import Attention, Layer
    from upfit.architecture.layers import Architecture

OWN_KEYS = ("base_model_type", "auto_map", "architectures")


def plan_merge(architecture: "Architecture", options: Any) -> Plan:
    """Fold what was added into the stock class: DEX into the output projection, pairs with a λ a head into twice the heads.

    Raises UpfitError for a λ that depends on the token, which no stock class can compute.
    """
    settings = architecture.config
    if settings["diff_variant"] == "v2" and settings["diff_lambda"] == "token":
        raise UpfitError(
            "λ depends on the token here, which no stock class computes; this model needs its modelling file "
            "(convert with --lambdas head for one that folds)"
        )
    if settings.get("diff_cut") == "middle":
        raise UpfitError(
            "a naive split cuts through rotated pairs, which no projection can do; this model needs its modelling file"
        )
    whole = settings if settings["diff_variant"] != "split" else architecture.with_queries_times(2)
    config = {key: value for key, value in whole.items() if not key.startswith("diff_") and key not in OWN_KEYS}
    config["model_type"] = settings["base_model_type"]
    rules: list[Rule] = []
    for layer in architecture.layers:
        if settings["diff_variant"] == "split":
            rules += _fold_split_rules(layer, architecture, config)
        else:
            rules.append((_fold_dex_rule if settings["diff_variant"] == "dex" else _fold_pairs_rule)(layer))
    return Plan(config, tuple(rules), close=True)


def _folding(layer: "Layer", added: tuple[str, ...], change: Any, label: str, parts: tuple[str, ...] = ("o",)) -> Rule:
    """A rule on `parts` that also reads and drops the tensors `added`."""
    names = tuple(layer.stem + name for name in added)

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        extra = [tensors[name] for name in names]
        return layer.rule(parts, lambda attention: change(attention, *extra), label).apply(tensors)

    plain = layer.rule(parts, lambda attention: attention, label)
    return replace(plain, reads=(*plain.reads, *names), apply=apply, drops=(*plain.drops, *names))


def _fold_dex_rule(layer: "Layer") -> Rule:
    from upfit.convert.diff.pairs import fold_dex

    def change(attention: "Attention", weight: "Tensor", strength: "Tensor", heads: "Tensor") -> "Attention":
        return fold_dex(attention, weight, strength * heads)

    return _folding(layer, ("dex_weight", "dex_lambda", "dex_heads"), change, "DEX folded into o")


def _fold_pairs_rule(layer: "Layer") -> Rule:
    from upfit.convert.diff.pairs import spread_output

    def change(attention: "Attention", logits: "Tensor") -> "Attention":
        return spread_output(attention, logits.float().sigmoid())

    return _folding(layer, ("lambda_logit",), change, "outputs [o, −λ o]")


def _fold_split_rules(layer: "Layer", architecture: "Architecture", config: dict[str, Any]) -> list[Rule]:
    from upfit.convert.diff.pairs import halve, spread_output

    query = f"{layer.path}.{architecture.entry.q}.weight"
    if class_shapes(config)[query][0] != 2 * class_shapes(architecture.config)[query][0]:
        raise UpfitError(f"{config['model_type']} cannot have twice the query heads; this model needs its modelling file")
    if "q_norm.weight" in layer.names:
        raise UpfitError("its queries are normed, so halves of them are not queries; this model needs its modelling file")

    def change(attention: "Attention", scale: "Tensor", logits: "Tensor") -> "Attention":
        return spread_output(halve(attention, scale), logits.float().sigmoid())

    added = ("split_scale", "lambda_logit")
    rules = [_folding(layer, added, change, "halves as heads, outputs [o, −λ o]", ("q", "q_bias", "o"))]
    return rules + ([sinks_rule(layer.names["sinks"])] if "sinks" in layer.names else [])
