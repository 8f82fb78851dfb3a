"""Runs a plan over a checkpoint, or over meta tensors, which is the dry run: the same code, without the values.

A tensor that no rule writes or drops passes through untouched, as bytes. Before anything is written the whole result is
known (names, shapes, types, sizes, file offsets) and compared with what the target class wants.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from upfit.architecture.attention import Layer
from upfit.architecture.layers import Architecture
from upfit.architecture.names import name_map
from upfit.checkpoint.execute import Planned
from upfit.checkpoint.plan import Plan
from upfit.checkpoint.reader import safetensors_dtype
from upfit.checkpoint.side_files import check_side_files
from upfit.errors import UpfitError


def check_against_class(
    plan: Plan, planned: list[Planned], architecture: Architecture, beyond: Mapping[str, str] | None = None
) -> None:
    """Compare the result with the target class built on the meta device. Tensors `beyond` the class are held against those of
    its own layers that they are like ("" for none).

    Raises ValueError when a written tensor is unknown to the class or has another shape, or when a parameter that differs
    between the source's class and the target's is not written.
    """

    source = name_map(architecture.config, stored=True).shapes
    target = name_map(plan.config, stored=True)
    beyond, by_name = beyond or {}, {item.name: item for item in planned}
    for name, like in beyond.items():
        if like and by_name[name].shape != by_name[like].shape:
            raise ValueError(f"{name!r} has shape {by_name[name].shape}, and {like!r} has {by_name[like].shape}")
    written = {}
    for item in planned:
        if item.rule is not None and item.name not in beyond:
            module_name = target.module_name(item.name)
            if target.shapes.get(module_name) != item.shape:
                raise ValueError(f"{item.name!r} has shape {item.shape}, the class wants {target.shapes.get(module_name)}")
            written[module_name] = item
    different = [name for name, shape in target.shapes.items() if source.get(name) != shape]
    forgotten = [n for n in different if n not in written and not any(o in written for o in target.tied.get(n, ()))]
    if forgotten:
        raise ValueError(f"the target class wants {forgotten[0]!r} as {target.shapes[forgotten[0]]}, and no rule writes it")


def changed_layers(architecture: Architecture, plan: Plan) -> list[Layer]:
    """The attention layers that have other parameters, or other shapes, in the class of the plan's config."""

    before, after = (name_map(config, stored=True).shapes for config in (architecture.config, plan.config))
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [layer for layer in architecture.layers if any(name.startswith(layer.path + ".") for name in different)]


def edit_dtype(config: dict[str, Any], dtype_name: str) -> dict[str, Any]:
    """`config` with `dtype` (and `torch_dtype`, where older files have it) changed, nested configs included."""
    changed = {key: edit_dtype(value, dtype_name) if isinstance(value, dict) else value for key, value in config.items()}
    for key in ("dtype", "torch_dtype"):
        if isinstance(changed.get(key), str):
            changed[key] = dtype_name
    return changed


def in_dtype(plan: Plan, name: str | None) -> tuple[Plan, str | None]:
    """The plan with its config in the type of torch called `name`, and that type's safetensors name; as it is without one."""
    import torch

    if name is None:
        return plan, None
    if name in plan.refused_dtypes:
        raise UpfitError(f"--dtype {name}: {plan.refused_dtypes[name]}")
    changed = replace(plan, config={"dtype": name} | edit_dtype(plan.config, name))
    return changed, safetensors_dtype(getattr(torch, name))


def output_bytes(planned: list[Planned], folder: Path) -> int:
    """Bytes the output folder will need: tensors plus what is copied from the source folder.

    Raises UpfitError for files there that cannot be copied.
    """

    side = sum(path.stat().st_size for path in check_side_files(folder).values())
    return sum(item.nbytes for item in planned) + side + 2**20
