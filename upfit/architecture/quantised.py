"""Tells whether a checkpoint is quantised by what it stores; config keys may be missing.

Packed or scaled weights cannot be merged as if they were plain numbers, and a result without its scales would load as well as a
right one. So a tensor is refused when it is not floating-point and the class computes with it in floating point.
"""

import re
from typing import TYPE_CHECKING

from upfit.architecture.names import name_map
from upfit.checkpoint.quantised_config import FILES, method_of, refusal
from upfit.checkpoint.reader import read_object
from upfit.checkpoint.side_files import contained

if TYPE_CHECKING:
    from upfit.architecture.names import NameMap
    from upfit.checkpoint.reader import Checkpoint


PLAIN = {"F16", "BF16", "F32", "F64"}
KINDS = {"F8": "FP8", "F6": "FP6", "F4": "FP4", "I8": "INT8"}
# What quantisers store beside `weight` or instead of it: GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt, HQQ and others.
# A scale of cached keys or values (`k_scale`) is none: the weights beside it are what they were.
COMPANION = re.compile(
    r"(\.|^)(qweight|qzeros|q?scales|zeros|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|W_q|Qidxs|"
    r"(weight|input|activation|act)_(scale(_?inv)?|scale_\d|scales|zero_point|global_scale)|"
    r"(weights?|input|activation|prequant)_scaling_factor|weight_(packed|shape|g_idx)|quant_state\.\w+|"
    r"weight\._(data|scale|shift))$|_(weight_scale|scale_inv)$"
)
PACKED = re.compile(r"_(blocks|scales|qweight|packed)$")  # so called by others too, where it is of plain numbers


def check_not_quantised(checkpoint: "Checkpoint") -> None:
    """Raise UpfitError when the weights of an opened checkpoint are stored quantised."""

    for path in (checkpoint.folder / name for name in FILES):
        if path.exists():
            method = method_of(read_object(contained(path, checkpoint.folder))) if path.is_file() else ""
            raise refusal(checkpoint.folder, f"{method or 'unknown'}, by its {path.name}")
    names = name_map(checkpoint.config, stored=True)
    stored = {name: names.module_name(name) for name in checkpoint.tensors}
    taken = set(stored.values())
    for name, parameter in stored.items():
        why = _why(name, parameter, checkpoint.tensors[name].dtype, names, taken)
        if why:
            raise refusal(checkpoint.folder, why)


def _why(name: str, parameter: str, dtype: str, names: "NameMap", taken: set[str]) -> str:
    """What is quantised about a tensor; empty for a plain one, and for integers that the class has as such or does not need."""
    kind = KINDS.get(dtype[:2], "packed")
    if parameter in names.shapes:
        return f"{kind}: {name} is stored as {dtype}" if parameter in names.floating and dtype not in PLAIN else ""
    if kind.startswith("FP"):
        return f"{kind}: {name} is stored as {dtype}"
    if COMPANION.search(name) or (PACKED.search(name) and dtype not in PLAIN):
        return f"{name} stands beside its weights"
    module = parameter.rpartition(".")[0]
    instead = [f"{place}.weight" for place in (module, module.rpartition(".")[0])]
    missing = [weight for weight in instead if weight in names.floating and weight not in taken]
    return f"{kind}: {name}, of {dtype}, stands for {missing[0]}" if missing and dtype not in PLAIN else ""
