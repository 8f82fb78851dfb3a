"""The names of a class's parameters, and the name of each in the checkpoint's files."""

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from upfit.architecture.fused import Apart, Turned
from upfit.architecture.meta_model import build_on_meta
from upfit.architecture.table import Described, known_entry
from upfit.model_files import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NameMap:
    """How the names in a checkpoint file correspond to parameters of the class, as `from_pretrained` reads them."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        with quiet_transformers():
            conversions = get_model_conversion_mapping(model)
        state = model.state_dict(keep_vars=True)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
        self.classes = {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}
        self.added = _named_by_modules(model, "upfit_added")
        self.fused = {path: module.arrangement for path, module in model.named_modules() if isinstance(module, Apart)}
        self.turned = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Turned)}
        self.cached = _named_by_modules(model, "upfit_cached") & self.shapes.keys()
        same: dict[int, list[str]] = {}
        for name, tensor in state.items():
            same.setdefault(id(tensor), []).append(name)
        self.tied = {name: group for group in same.values() if len(group) > 1 for name in group}
        self._rename = functools.partial(
            rename_source_key,
            weight_renamings=[entry for entry in conversions if isinstance(entry, WeightRenaming)],
            weight_converters=[entry for entry in conversions if isinstance(entry, WeightConverter)],
            base_model_prefix=model.base_model_prefix,
            meta_state_dict=self.shapes,
        )

    def module_name(self, disk_name: str) -> str:
        """The parameter that a tensor of the file becomes (or becomes a part of)."""
        return self._rename(disk_name)[0]


def _named_by_modules(model: "PreTrainedModel", what: str) -> set[str]:
    """Names of the parameters that modules of ours name in their attribute `what`."""
    return {f"{path}.{name}" for path, module in model.named_modules() for name in getattr(module, what, ())}


def name_map(config: dict[str, Any], stored: bool = False) -> NameMap:
    """Names and shapes of the class of this config, as it is seen or as it is `stored`. A conversion asks several times, and a
    large model takes seconds."""
    entry = known_entry(config) if stored else None
    return _name_map(json.dumps(config), entry is not None and bool(entry.fused))


@functools.lru_cache(maxsize=32)
def _name_map(text: str, stored: bool) -> NameMap:
    return NameMap(build_on_meta(json.loads(text), stored=stored))


def disk_names(names: "NameMap", tensors: Mapping[str, "Described"]) -> dict[str, str]:
    """Parameter name -> tensor name in the file, for the tensors that become one parameter whole."""
    stored = {}
    for disk_name, info in tensors.items():
        module_name = names.module_name(disk_name)
        if names.shapes.get(module_name) == info.shape:
            stored[module_name] = disk_name
    return stored
