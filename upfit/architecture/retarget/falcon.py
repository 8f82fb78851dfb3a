"""A multi-head Falcon of the older form as one of the newer form, which stores the same rows and counts key/value heads."""

from typing import Any

from upfit.architecture.retarget.draft import Draft
from upfit.errors import UpfitError


def is_multi_head(config: dict[str, Any]) -> bool:
    """Whether this is the older form with a key/value head for each query head."""
    return not config.get("new_decoder_architecture", False) and not config.get("multi_query", True)


def from_falcon(draft: Draft) -> dict[str, Any]:
    """The config; the draft gets the tensors, all as they are: a group of one query head is stored as q, k, v.

    Raises UpfitError for Falcon-RW's kind, which puts the MLP after the attention.
    """
    config = draft.config
    if not config.parallel_attn:
        raise UpfitError(
            "this Falcon puts the MLP after the attention, which the newer form that counts key/value heads cannot; convert a "
            "Falcon with parallel_attn"
        )
    for name in draft.disk:
        draft.renames[name] = draft.stored(name)
    changed = {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": config.num_attention_heads}
    return {key: value for key, value in draft.raw.items() if key != "n_embed"} | changed | {"hidden_size": config.hidden_size}
