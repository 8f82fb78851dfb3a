"""Contextual position encoding (CoPE): positions that count only some tokens, chosen by the content. Not Clipped RoPE."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upfit.architecture.decoder_check import auto_map, check_decoder
from upfit.checkpoint.plan import Plan, Rule, Tensors
from upfit.convert.cope.options import Options, new_tensors
from upfit.convert.recipe import Fit, FitContext, Recipe, possible
from upfit.errors import UpfitError
from upfit.options import flag
from upfit.provenance import STATE, UNSETTLED

if TYPE_CHECKING:
    from torch import Tensor

    from upfit.architecture.attention import Layer
    from upfit.architecture.layers import Architecture

PAPER = "Golovneva et al. 2024, Contextual Position Encoding, arXiv 2405.18719"
MODEL_TYPE = "upfit_cope"


def plan(architecture: "Architecture", options: Options) -> Plan | Fit:
    """The outline of the plan; the rest is read off the model while it runs over text.

    Raises UpfitError for a family or a setting that cannot be had.
    """
    if options.reach < options.positions:
        raise UpfitError(f"{flag('span')} got {options.span}; no gate is above 1, so give at least {options.positions}")
    if options.every > len(architecture.layers):
        raise UpfitError(f"{flag('every')} got {options.every}; give a number from 1 to {len(architecture.layers)}")
    if options.drop_rope and options.every > 1:
        raise UpfitError("--drop-rope leaves layers without contextual positions with none at all; leave out --every")
    check_decoder(architecture)
    chosen = list(architecture.layers[:: options.every])
    rules = tuple(_rule(layer, options) for layer in chosen)
    report = {STATE: UNSETTLED} if options.drop_rope else None
    outline = Plan(_config(architecture, options, chosen), rules, exact=True, report=report)

    if options.gates == "constant" and not options.drop_rope:
        return outline

    def run(context: FitContext) -> Plan:
        from upfit.convert.cope.fit import fit

        return fit(context, replace(outline, rules=()), options, chosen)

    return Fit(outline, run, otherwise="--gates constant")


def _rule(layer: "Layer", options: Options) -> Rule:
    """A layer's new tensors with gates that do not look at the text; those that do are fitted."""
    query, key = layer.names["q.weight"], layer.names["k.weight"]
    names = {layer.stem + name: size for name, size in new_tensors(layer, options).items()}
    own = [layer.stem + "cope_gate_keys.weight"] if options.gates == "keys" else []
    level = math.log(options.share / (1 - options.share))

    def apply(tensors: Tensors) -> "dict[str, Tensor]":
        new = {name: tensors[query].new_zeros(size) for name, size in names.items()}
        new[layer.stem + "cope_gate_bias"] += level
        return new | dict.fromkeys(own, tensors[key])

    return Rule((query, key), (*names, *own), apply, f"contextual positions, {options.gates} gates")


def _config(architecture: "Architecture", options: Options, chosen: "list[Layer]") -> dict[str, Any]:
    """`config.json` as `modeling_upfit_cope.py` reads it, but for what is found by running the model."""
    entry = architecture.entry
    settings = {
        "positions": options.positions,
        "gates": options.gates,
        "embeddings": options.embeddings,
        "scale": options.scale,
        "drop_rope": options.drop_rope,
        "layers": [layer.path for layer in chosen],
        "modules": {"q": entry.q, "k": entry.k, "q_norm": entry.q_norm, "k_norm": entry.k_norm},
        "rotations": {},
    }
    return {
        **architecture.config,
        "architectures": ["UpfitCopeForCausalLM"],
        "model_type": MODEL_TYPE,
        "base_model_type": entry.model_type,
        "auto_map": auto_map("modeling_upfit_cope.UpfitCope"),
        "cope": settings,
    }


def _trials(architecture: "Architecture") -> list[Options]:
    options = Options(gates="constant", positions=8)
    return [options] if possible(plan, architecture, options) else []


RECIPES = (
    Recipe(
        name="cope",
        summary="positions that count by content (contextual position encoding; not Clipped RoPE)",
        paper=PAPER,
        options=Options,
        plan=plan,
        identity=lambda architecture: next(iter(_trials(architecture)), None),
        trials=_trials,
        offers=lambda architecture: "--gates content|keys|constant" if _trials(architecture) else "",
    ),
)
