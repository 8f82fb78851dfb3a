"""Our class `upfit_gqa`, for families whose own class always has as many key/value heads as query heads.

A row of `table.toml` says how the family's code is written (`own`, see `modeling_upfit_gqa.py`), how its attention modules name
their number of query heads (`heads`), and inside which module they are changed (`inside`; empty: everywhere).
"""

import copy
from typing import TYPE_CHECKING, Any

from upfit.architecture.meta_model import auto_class_for
from upfit.architecture.table import MODEL_TYPE
from upfit.errors import UpfitError
from upfit.modeling.registry import is_own

if TYPE_CHECKING:
    from upfit.architecture.table import Entry


def is_grouped(config: dict[str, Any]) -> bool:
    """Whether this is a model of that class; it can have fewer heads still."""
    return config.get("model_type") == MODEL_TYPE


def as_own(config: dict[str, Any], entry: "Entry") -> dict[str, Any]:
    """A copy of `config` as one of our class, its number of key/value heads still open; of other families, and of a config that
    is one of ours already, just a copy.

    Raises UpfitError for a model that none of our classes is for.
    """
    changed = copy.deepcopy(config)
    if not entry.own or is_own(config):
        return changed

    auto = auto_class_for(config)
    if not auto.__name__.startswith("AutoModelFor"):
        raise UpfitError(f"{auto.__name__} is no language model; convert the whole model that it is a part of")
    kind = auto.__name__.removeprefix("AutoModel")
    stem = "modeling_upfit_gqa.UpfitGqa"
    return {
        **changed,
        "architectures": [f"UpfitGqa{kind}"],
        "model_type": MODEL_TYPE,
        "base_model_type": entry.model_type,
        "auto_map": {"AutoConfig": f"{stem}Config", "AutoModel": f"{stem}Model", f"AutoModel{kind}": f"{stem}{kind}"},
        "gqa": {
            "kv_heads": None,
            "heads": entry.heads,
            "modules": [entry.fused] if entry.fused else [entry.k, entry.v],
            "fused": entry.fused_by if entry.fused else "",
            "code": entry.own,
            "inside": entry.inside,
        },
    }
