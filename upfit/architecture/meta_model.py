"""Model classes without weights: what a config's class wants, and whether a folder loads into it completely.

The only place of the converter that touches model classes. Everything happens on the meta device, so size does not matter.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfit.architecture.fused import Apart, set_apart
from upfit.architecture.layers import Entry, entry_for
from upfit.errors import UpfitError
from upfit.model_files import check_numbers, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upfit.architecture.layers import Described
    from upfit.checkpoint.reader import Checkpoint

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMultimodalLM",
)
MAX_LAYERS = 1000  # a config that asks for more is not a language model's


# Modules and parameters a class may register for each stored tensor, and beside: some have no weights, some share theirs.
PARTS_A_TENSOR, PARTS_BESIDE = 16, 10_000
MOST_PARTS = 1_000_000  # where nothing is known of tensors
_allowed: ContextVar[int] = ContextVar("allowed parts", default=MOST_PARTS)


@contextmanager
def built_of(tensors: int) -> Iterator[None]:
    """In the block no class is built of more parts than a checkpoint of so many tensors can be loaded into."""
    token = _allowed.set(PARTS_A_TENSOR * tensors + PARTS_BESIDE)
    try:
        yield
    finally:
        _allowed.reset(token)


@contextmanager
def _counted() -> Iterator[None]:
    """Raise UpfitError when the model that is built in the block comes to have more parts than are allowed: whatever the number
    in its config is called, it is found out while it is followed."""
    from torch.nn.modules import module

    count, most = itertools.count(1), _allowed.get()

    def registered(*_: Any) -> None:
        if next(count) > most:
            raise UpfitError(f"config.json asks for more than the {most} layers and weights that these tensors can fill")

    handles = (
        module.register_module_module_registration_hook(registered),
        module.register_module_parameter_registration_hook(registered),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def skeleton(config: dict[str, Any], meta: bool = True, stored: bool = False) -> "PreTrainedModel":
    """The model that transformers builds for this `config.json`, on the meta device (or, without `meta`, where torch is set
    to). Fused queries, keys and values are set apart in it; with `stored` they are left as they are stored.

    Raises UpfitError when transformers has no such class or the class refuses the config.
    """
    import torch

    parsed = read_as_class(config)
    with _config_errors(config), quiet_transformers():
        model_class = model_class_for(config)
        with torch.device("meta") if meta else nullcontext(), _counted():
            model = model_class._from_config(parsed)
    entry = None if stored else _known_entry(config)
    if entry is not None and entry.fused:
        set_apart(model, entry.fused, entry.o, entry.fused_by, entry.fused_transposed)
    return model


def read_as_class(config: dict[str, Any]) -> Any:
    """`config.json` as its class reads it: every key that the class knows, old names and defaults resolved.

    Raises UpfitError when transformers has no such class or the class refuses the config.
    """
    from transformers import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise UpfitError(f"the installed transformers has no model type {model_type!r}; upgrade transformers")
    layers = [part.get("num_hidden_layers") for part in (config, *filter(lambda v: isinstance(v, dict), config.values()))]
    if any(isinstance(count, int) and not 0 <= count <= MAX_LAYERS for count in layers):
        raise UpfitError(f"config.json asks for {max(filter(None, layers))} layers; between 0 and {MAX_LAYERS} are built")
    check_numbers(config)
    with _config_errors(config), quiet_transformers():
        return CONFIG_MAPPING[model_type].from_dict(_with_floats(config))


@contextmanager
def _config_errors(config: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except UpfitError:
        raise
    except Exception as error:  # a class raises whatever it likes on a config that it does not understand
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UpfitError(f"transformers cannot build this {config['model_type']} config: {reason}") from error


def _with_floats(value: Any) -> Any:
    """A copy in which transformers' spelling of what JSON cannot say, `{"__float__": "Infinity"}`, is a number."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def model_class_for(config: dict[str, Any]) -> Any:
    """The class named in `architectures`, which may be one of ours, else the first auto class that knows the config's type."""
    import transformers
    from transformers import CONFIG_MAPPING

    named = [name for name in config.get("architectures") or () if isinstance(name, str)]
    for name in named:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    config_class = CONFIG_MAPPING[config["model_type"]]
    mappings = [getattr(transformers, auto)._model_mapping for auto in AUTO_CLASSES if hasattr(transformers, auto)]
    known = [mapping[config_class] for mapping in mappings if config_class in mapping]
    known = [found[0] if isinstance(found, tuple) else found for found in known]
    for found in known:
        if found.__name__ in named:
            return found
    if known:
        return known[0]
    raise UpfitError(f"transformers has no language model class for {config['model_type']!r}; name one in `architectures`")


def auto_class_for(config: dict[str, Any]) -> Any:
    """The auto class whose `from_pretrained` gives `model_class_for(config)`; that class itself where no auto class does."""
    import transformers
    from transformers import CONFIG_MAPPING

    wanted = model_class_for(config)
    for auto in AUTO_CLASSES:
        auto_class = getattr(transformers, auto, None)
        found = auto_class._model_mapping.get(CONFIG_MAPPING[config["model_type"]], None) if auto_class else None
        if found is not None and wanted in (found if isinstance(found, tuple) else (found,)):
            return auto_class
    return wanted


class Names:
    """How the names in a checkpoint file correspond to parameters of the class, as `from_pretrained` reads them."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        with quiet_transformers():
            conversions = get_model_conversion_mapping(model)
        state = model.state_dict(keep_vars=True)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
        self.added = _said(model, "upfit_added")
        self.fused = {path: module.arrangement for path, module in model.named_modules() if isinstance(module, Apart)}
        self.cached = _said(model, "upfit_cached") & self.shapes.keys()
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


def _said(model: "PreTrainedModel", what: str) -> set[str]:
    """Names of the parameters that modules of ours name in their attribute `what`."""
    return {f"{path}.{name}" for path, module in model.named_modules() for name in getattr(module, what, ())}


def class_names(config: dict[str, Any], stored: bool = False) -> Names:
    """Names and shapes of the class of this config, as it is seen or as it is `stored`. A conversion asks several times, and a
    large model takes seconds."""
    entry = _known_entry(config) if stored else None
    return _class_names(json.dumps(config), entry is not None and bool(entry.fused))


def _known_entry(config: dict[str, Any]) -> "Entry | None":
    try:
        return entry_for(config)
    except UpfitError:  # models that cannot be converted can still be built
        return None


@functools.lru_cache(maxsize=8)
def _class_names(text: str, stored: bool) -> Names:
    return Names(skeleton(json.loads(text), stored=stored))


def structure_report(config: dict[str, Any], tensors: "Mapping[str, Described]") -> dict[str, Any]:
    """What `from_pretrained` reports (see `load_with_report`) of a folder with this config and these tensors, found by loading
    them without their values: of a large checkpoint not a byte is read.

    Raises UpfitError when the class cannot be built or the tensors do not load at all.
    """
    import torch

    from upfit.checkpoint.reader import torch_dtype

    state = {name: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta") for name, info in tensors.items()}
    with _config_errors(config):
        parsed, model_class = read_as_class(config), model_class_for(config)
    with built_of(len(tensors)):
        return _loaded(model_class, None, config=parsed, state_dict=state, device_map="meta")[1]


def check_structure(checkpoint: "Checkpoint", unexpected: frozenset[str] | None = None) -> None:
    """Raise UpfitError, as `load_strictly` does, when the opened folder would not load completely into its class."""
    _complain(checkpoint.folder, structure_report(checkpoint.config, checkpoint.tensors), unexpected)


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
    for kind, found in report.items():
        if found:
            names = ", ".join(sorted(map(str, found))[:3])
            raise UpfitError(f"{folder} does not load completely: {len(found)} {kind.replace('_', ' ')}, e.g. {names}")


def load_with_report(folder: Path, auto_class: Any = None, **options: Any) -> tuple["PreTrainedModel", dict[str, Any]]:
    """`from_pretrained` and its report: the sets missing_keys, unexpected_keys, mismatched_keys and error_msgs.

    Raises UpfitError when the folder does not load at all.
    """
    from upfit.checkpoint.reader import open_checkpoint, read_config

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
        with quiet_transformers(), _counted():
            model, info = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    except UpfitError:
        raise
    except Exception as error:  # a class raises whatever it likes on weights or a config that it does not understand
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UpfitError(f"{folder or 'the checkpoint'} does not load into its class: {reason}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model, {kind: info[kind] for kind in kinds}


def vocabulary(config: dict[str, Any]) -> int | None:
    """Number of token ids the model knows, from its input embedding; None when it has none."""
    try:
        return int(skeleton(config).get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    except (AttributeError, NotImplementedError):
        return None
