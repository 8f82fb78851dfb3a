"""Loads a folder into its class, and raises where anything is missing, left over or of another shape."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upfit.architecture.leftovers import left_over
from upfit.architecture.meta_model import (
    auto_class_for,
    built_of,
    config_errors,
    counted,
    model_class_for,
    nothing_drawn,
    read_as_class,
)
from upfit.architecture.names import name_map
from upfit.checkpoint.reader import open_checkpoint, read_config, torch_dtype
from upfit.errors import UpfitError
from upfit.model_files import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upfit.architecture.table import Described
    from upfit.checkpoint.reader import Checkpoint


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Whether the hardware has matrix units for bfloat16; without, it may be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def structure_report(config: dict[str, Any], tensors: "Mapping[str, Described]") -> dict[str, Any]:
    """What `from_pretrained` reports (see `load_with_report`) of a folder with this config and these tensors, found by loading
    them without their values: of a large checkpoint not a byte is read.

    Raises UpfitError when the class cannot be built or the tensors do not load at all.
    """
    import torch

    state = {name: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta") for name, info in tensors.items()}
    with config_errors(config):
        parsed, model_class = read_as_class(config), model_class_for(config)
    with built_of(len(tensors)):
        return _loaded(model_class, None, config=parsed, state_dict=state, device_map="meta")[1]


def check_structure(checkpoint: "Checkpoint", unexpected: frozenset[str] | None = None) -> None:
    """Raise UpfitError, as `load_strictly` does, when the opened folder would not load completely into its class."""
    _complain(checkpoint.folder, structure_report(checkpoint.config, checkpoint.tensors), unexpected)


def unused_tensors(checkpoint: "Checkpoint") -> tuple[frozenset[str], frozenset[str]]:
    """The tensors of a checkpoint that its own class does not take, and what its loading calls them.

    Raises UpfitError when it is incomplete.
    """

    report = structure_report(checkpoint.config, checkpoint.tensors)
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report[kind]:
            first = ", ".join(sorted(map(str, report[kind]))[:3])
            what = f"{len(report[kind])} {kind.replace('_', ' ')}, e.g. {first}"
            raise UpfitError(f"the source {checkpoint.folder} is incomplete: {what}")
    names = name_map(checkpoint.config, stored=True)
    unused = left_over(checkpoint.tensors, names.module_name, names.shapes)
    return unused, unused | frozenset(report["unexpected_keys"])


def load_strictly(
    folder: Path, auto_class: Any = None, unexpected: frozenset[str] | None = None, **options: Any
) -> "PreTrainedModel":
    """`from_pretrained` of a local folder; every weight of the class must come from the file.

    `options` go to `from_pretrained`. `unexpected` names the tensors
    of the file that the class may leave unused (None: any). Never runs code of the folder.
    Raises UpfitError naming the first tensors that are missing, of another shape, or left over.
    """
    model, report = load_with_report(folder, auto_class, **options)
    _complain(folder, report, unexpected)
    return model.eval()


def _complain(folder: Path, report: dict[str, Any], unexpected: frozenset[str] | None) -> None:
    report["unexpected_keys"] = set() if unexpected is None else set(report["unexpected_keys"]) - unexpected
    for kind, named in report.items():
        if named:
            names = ", ".join(sorted(map(str, named))[:3])
            raise UpfitError(f"{folder} does not load completely: {len(named)} {kind.replace('_', ' ')}, e.g. {names}")


def load_with_report(folder: Path, auto_class: Any = None, **options: Any) -> tuple["PreTrainedModel", dict[str, Any]]:
    """`from_pretrained` and its report: the sets missing_keys, unexpected_keys, mismatched_keys and error_msgs.

    Raises UpfitError when the folder does not load at all.
    """

    auto_class = auto_class or auto_class_for(read_config(folder))
    try:
        with open_checkpoint(folder) as checkpoint:
            tensors = len(checkpoint.tensors)
    except UpfitError:  # quantised or pickled: the class may load it all the same
        return _loaded(auto_class, folder, **options)
    with built_of(tensors):
        return _loaded(auto_class, folder, **options)


def _loaded(auto_class: Any, folder: Path | None, **options: Any) -> tuple["PreTrainedModel", dict[str, Any]]:
    options = {"local_files_only": True, "trust_remote_code": False, **options}
    try:
        with quiet_transformers(), counted(), nothing_drawn():
            model, info = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    except UpfitError:
        raise
    except Exception as error:  # a class raises whatever it likes on weights or a config that it does not understand
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UpfitError(f"{folder or 'the checkpoint'} does not load into its class: {reason}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model, {kind: info[kind] for kind in kinds}


@contextmanager
def garbage_collected() -> Iterator[None]:
    """At the end of the block the models that it made, and nobody refers to any more, are gone. Only what it made is looked
    through: torch and transformers hold 400,000 objects, for which a collection takes 0.3 s."""
    frozen = gc.get_freeze_count() > 0  # somebody else's, who may want it to stay so
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not frozen:
            gc.unfreeze()


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
