"""Writes the trained student as a standard folder, with the names, types and files of the folder it came from."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from upfit.architecture.meta_model import quiet_transformers
from upfit.architecture.names import NameMap
from upfit.checkpoint.reader import INDEX, Checkpoint, open_checkpoint, read_config, torch_dtype
from upfit.checkpoint.safetensors_header import TensorInfo
from upfit.checkpoint.side_files import copy_code, copy_side_files
from upfit.durable import as_new_file
from upfit.errors import UpfitError
from upfit.uptrain.model.model_traits import load


def layout_of(student: PreTrainedModel, source: Path) -> dict[str, str]:
    """For every tensor stored in `source` that the class reads, the name under which transformers saves the same one.

    It is another one where the folder leaves the prefix of the base model out, or stores a tied weight under a second name.
    `student` is as it was loaded from the folder, not yet wrapped; no value is looked at.

    Raises UpfitError where a stored tensor could not be written from the trained ones: that is known before the first step.
    """
    described = {name: torch.empty_like(tensor, device="meta") for name, tensor in student.state_dict().items()}
    saved, names = as_saved(student, described), NameMap(student)
    by_parameter: dict[str, list[str]] = {}
    for name in saved:
        by_parameter.setdefault(names.module_name(name), []).append(name)
    layout = {}
    with open_checkpoint(source) as checkpoint:
        for name, info in checkpoint.tensors.items():
            parameter = names.module_name(name)
            if parameter not in names.shapes:
                continue
            near = namesakes(name, by_parameter.get(parameter, []))
            trouble = hindrance(info, near, saved)
            if trouble is not None:
                raise UpfitError(
                    f"{source} stores {parameter} as {name}, {trouble}: it could not be written once it is trained"
                )
            layout[name] = near[0]
    return layout


def hindrance(info: TensorInfo, near: list[str], saved: dict[str, Tensor]) -> str | None:
    """Why the stored tensor `info` cannot hold what transformers saves under the names `near`; None where it can."""
    if len(near) != 1 or tuple(saved[near[0]].shape) != tuple(info.shape):
        return f"and transformers as {', '.join(near[:3]) or 'nothing'} (load it with transformers and save it anew)"
    if saved[near[0]].is_floating_point() and not torch_dtype(info.dtype).is_floating_point:
        return f"in {info.dtype}, which holds no fractions (give a model in a floating type)"
    return None


def namesakes(name: str, candidates: list[str]) -> list[str]:
    """Which of the saved tensors that belong to one parameter is meant by the stored `name`: where many make up one parameter,
    that of the same name but for a prefix."""
    if name in candidates or len(candidates) < 2:
        return [name] if name in candidates else candidates
    return [
        candidate for candidate in candidates if f".{candidate}".endswith(f".{name}") or f".{name}".endswith(f".{candidate}")
    ]


def as_saved(student: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` (by the names of the class, also on the meta device) as transformers saves them: what its loader renamed, split
    or joined is undone."""
    with quiet_transformers():
        return revert_weight_conversion(student, weights)


def export(
    student: PreTrainedModel,
    weights: dict[str, Tensor],
    layout: dict[str, str],
    source: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `student` with its `weights` (float32, by name, in the host's memory) into the empty `folder`, with the names and
    files of `source` (`layout`: see `layout_of`); config.json stays byte for byte.

    Tensors have the types that they have in `source`, or `dtype` where one is given.

    The folder is loaded again afterwards and compared with the weights: every one must be the trained one, rounded.
    """
    saved = as_saved(student, weights)
    with open_checkpoint(source) as old:
        for path in old.files:
            names = [info.name for info in old.tensors.values() if info.file == path]
            shard = {
                name: trained(saved[layout[name]], old, name, dtype) if name in layout else old.read(name) for name in names
            }
            save_file(shard, folder / path.name, metadata=metadata_of(path))
            as_new_file(folder / path.name)
    for name in ("config.json", INDEX):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    copy_side_files(source, folder)
    copy_code(read_config(source), folder)
    check_export(weights, folder, dtype)


def metadata_of(path: Path) -> dict[str, str] | None:
    with safe_open(path, "pt") as file:
        return file.metadata()


def trained(tensor: Tensor, old: Checkpoint, name: str, dtype: torch.dtype | None) -> Tensor:
    """`tensor` as it is to be stored under `name`, in memory of its own and of the type it had there; fractions in `dtype`,
    where one is given."""
    stored = torch_dtype(old.tensors[name].dtype)
    return tensor.to(dtype if dtype and stored.is_floating_point else stored, copy=True).contiguous()


@torch.no_grad()
def check_export(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:
    """Load `folder` as anybody would (in `dtype`, where config.json tells of another) and compare; what differs by more than
    rounding is a defect of ours."""
    written = dict(load(folder, dtype or "auto", torch.device("cpu")).named_parameters())
    with open_checkpoint(folder) as checkpoint:
        dtypes = {torch_dtype(info.dtype) for info in checkpoint.tensors.values()}
    finfo = max((torch.finfo(dtype) for dtype in dtypes if dtype.is_floating_point), key=lambda info: info.eps)
    for name, tensor in written.items():
        wanted = weights[name]
        close = (tensor.float() - wanted).abs() <= finfo.eps * wanted.abs() + finfo.smallest_normal
        assert bool(close.all()), f"{name} was not written as it was trained"
