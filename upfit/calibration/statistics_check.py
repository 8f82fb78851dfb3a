"""Checks the types and shapes in a statistics file before anything is computed from it."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from torch import Tensor

from upfit.calibration.between import OF_DIMENSIONS
from upfit.calibration.residual import Residual
from upfit.calibration.traits import AttentionTraits
from upfit.checkpoint.safetensors_header import TensorInfo
from upfit.options import fits


def check_traits(traits: AttentionTraits) -> None:
    """Raise ValueError where a field is of another type, or the order and pairs of dimensions contradict each other."""
    _check_types(traits)
    if traits.residual is not None:
        _check_types(traits.residual)
    width = len(traits.order)
    if sorted(traits.order) != list(range(width)) or not 0 <= 2 * traits.pairs <= width:
        raise ValueError("its dimensions are in no order")
    if len(traits.speeds) != traits.pairs or not all(map(math.isfinite, traits.speeds)):
        raise ValueError("its pairs have no speeds")


def _check_types(record: AttentionTraits | Residual) -> None:
    hints = get_type_hints(type(record))
    for field in fields(record):
        value, kind = getattr(record, field.name), hints[field.name]
        inner = [part for part in get_args(kind) if part is not Ellipsis] if isinstance(value, tuple) else []
        if not fits(value, kind) or (inner and not all(fits(item, inner[0]) for item in value)):
            raise ValueError(f"{field.name} is {value!r}")


def check_windows(windows: Mapping[int, Tensor], held: Mapping[int, Any]) -> None:
    """Raise ValueError unless `windows` [n, length] hold token ids, the first `held[length]` of them held back."""
    if not windows or set(windows) != set(held):
        raise ValueError("it has no windows, or does not tell how many are held back")
    for length, ids in windows.items():
        if ids.ndim != 2 or ids.shape[1] != length or ids.numel() == 0 or int(ids.min()) < 0:
            raise ValueError(f"its windows of {length} tokens are none")
        if not fits(held[length], int) or not 0 <= held[length] < len(ids):
            raise ValueError(f"of {len(ids)} windows it says that {held[length]} are held back")


def _values(traits: AttentionTraits) -> str:
    return "value_dimensions" if traits.gated == OF_DIMENSIONS else "values"


def check_layer(traits: AttentionTraits, infos: Mapping[str, TensorInfo]) -> None:
    """Raise ValueError unless the tensors of one layer are those that `traits` promise, see `statistics.py`."""
    shapes = {name: info.shape for name, info in infos.items()}
    wanted = ["rows", *(["keys", "queries"] if traits.keys else []), *([_values(traits)] if traits.values else [])]
    wanted += ["key_pairs"] if traits.keys and traits.pairs else []
    if set(shapes) != set(wanted) or any(info.dtype != "F32" for info in infos.values()):
        raise ValueError(f"it has {', '.join(sorted(shapes)) or 'nothing'} where {', '.join(sorted(wanted))} belong")
    width = len(traits.order)
    square = all(len(shapes[name]) == 2 and len(set(shapes[name])) == 1 for name in ("keys", "values") if name in shapes)
    dimensions = shapes.get("value_dimensions", (0, 0, 0, 0))
    if shapes["rows"] != () or not square or len(dimensions) != 4 or dimensions[2] != dimensions[3]:
        raise ValueError("its sums have other shapes")
    if not traits.keys:
        return
    heads, kv_heads = shapes["queries"][0] if shapes["queries"] else 0, shapes["keys"][0] // max(width, 1)
    if shapes["queries"] != (heads, width, width) or shapes["keys"][0] != kv_heads * width:
        raise ValueError("its queries and keys are of another width")
    if "key_pairs" in shapes and shapes["key_pairs"] != (heads, traits.pairs, kv_heads, kv_heads, 2):
        raise ValueError("its pairs of keys have another shape")
