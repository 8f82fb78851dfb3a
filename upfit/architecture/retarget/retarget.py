"""Families whose config cannot say fewer key/value heads, shown as a family that can and computes the same.

The result is data: the other family's config, tensors that only change their name, and rules for the others. No file is
touched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from upfit.architecture.retarget import bigcode, falcon, nemotron, phi
from upfit.architecture.retarget.draft import Draft, check_class
from upfit.architecture.table import Described
from upfit.checkpoint.plan import Rule


@dataclass(frozen=True)
class Retarget:
    """A checkpoint as another family stores it.

    `config` is the whole `config.json`, with as many key/value heads as query heads. `renames` gives stored names by new ones,
    for tensors whose bytes are the same; `rules` make the others. `adapted_because` tells a user what the new architecture is
    and why.
    """

    config: dict[str, Any]
    renames: dict[str, str]
    rules: tuple[Rule, ...]
    adapted_because: str


def retarget(config: dict[str, Any], tensors: Mapping[str, Described]) -> Retarget | None:
    """How this checkpoint is seen as one of another family; None where its own family will do.

    Raises UpfitError for a configuration that the other family cannot express, and when tensors are missing.
    """
    make = _maker(config)
    if make is None:
        return None
    check_class(config)
    draft = Draft(config, tensors)
    settings = make(draft)
    target = TARGETS[settings["model_type"]]
    because = (
        f"{config['model_type']} has no setting for the number of key/value heads, so the result is a {target}, which has one "
        "and computes the same"
    )
    return Retarget(settings, draft.renames, tuple(draft.rules), because)


TARGETS = {  # the name of each target for people, by model type
    "falcon": "Falcon of the newer form (new_decoder_architecture)",
    "gpt_bigcode": "GPTBigCode (model_type gpt_bigcode; one key/value head or all)",
    "nemotron": "Nemotron (model_type nemotron)",
    "phi": "Phi (model_type phi)",
}
MAKERS: dict[str, Callable[[Draft], dict[str, Any]]] = {
    "biogpt": bigcode.from_biogpt,
    "codegen": phi.from_gptj,
    "gpt-sw3": bigcode.from_gpt2,
    "gpt2": bigcode.from_gpt2,
    "gpt_neox_japanese": nemotron.from_gpt_neox_japanese,
    "gptj": phi.from_gptj,
    "opt": bigcode.from_opt,
    "xglm": bigcode.from_xglm,
}


def _maker(config: dict[str, Any]) -> Callable[[Draft], dict[str, Any]] | None:
    """The function that fills a draft and gives the new config."""
    model_type = config["model_type"]
    if model_type == "gpt_neox":
        beside = config.get("use_parallel_residual", True)
        return phi.from_gpt_neox if beside else nemotron.from_gpt_neox
    if model_type == "falcon":
        return falcon.from_falcon if falcon.is_multi_head(config) else None
    return MAKERS.get(model_type)
