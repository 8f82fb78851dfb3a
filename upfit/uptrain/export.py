"""The trained student as a standard folder: the names, dtypes and files of the folder it came from."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from upfit.convert.checkpoint import INDEX, Checkpoint, open_checkpoint, read_config, torch_dtype
from upfit.convert.folders import copy_code, copy_side_files
from upfit.convert.skeleton import quiet_transformers
from upfit.uptrain.models import load


def export(
    student: PreTrainedModel, weights: dict[str, Tensor], source: Path, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write `student` with its `weights` (float32, by name, in the host's memory) into the empty `folder`, laid out as
    `source`; config.json stays byte for byte.

    Tensors have the types that they have in `source`, or `dtype` where one is given.

    The folder is loaded again afterwards and compared with the weights: every one must be the trained one, rounded.
    """
    raw = folder / ".raw"
    with quiet_transformers():
        # transformers knows what its loader renamed, split or joined; this is the only public way to have it undone.
        student.save_pretrained(raw, state_dict=weights)
    with open_checkpoint(source) as old, open_checkpoint(raw) as new:
        for path in old.files:
            names = [info.name for info in old.tensors.values() if info.file == path]
            shard = {name: trained(name, old, new, weights, dtype) for name in names}
            save_file(shard, folder / path.name, metadata=metadata_of(path))
    shutil.rmtree(raw)
    for name in ("config.json", INDEX):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    copy_side_files(source, folder)
    copy_code(read_config(source), folder)
    check_export(weights, folder, dtype)


def metadata_of(path: Path) -> dict[str, str] | None:
    with safe_open(path, "pt") as file:
        return file.metadata()


def trained(name: str, old: Checkpoint, new: Checkpoint, weights: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    """The tensor that belongs at `name`, in `dtype` or the one it had: as saved, else the parameter of that name (a tied one),
    else as it was (a tensor the class does not read)."""
    dtype = dtype or torch_dtype(old.tensors[name].dtype)
    if name in new.tensors:
        return new.read(name).to(dtype)
    return weights[name].to(dtype).clone() if name in weights else old.read(name)


@torch.no_grad()
def check_export(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:
    """Load `folder` as anybody would (in `dtype`, where config.json tells of another) and compare; what differs by more than
    rounding is a defect of ours."""
    written = dict(load(folder, dtype or "auto", torch.device("cpu")).named_parameters())
    with open_checkpoint(folder) as checkpoint:
        dtypes = {torch_dtype(info.dtype) for info in checkpoint.tensors.values()}
    finfo = max((torch.finfo(dtype) for dtype in dtypes if dtype.is_floating_point), key=lambda info: info.eps)
    for name, found in written.items():
        wanted = weights[name]
        close = (found.float() - wanted).abs() <= finfo.eps * wanted.abs() + finfo.smallest_normal
        assert bool(close.all()), f"{name} was not written as it was trained"
