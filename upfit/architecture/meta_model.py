"""Builds model classes without weights, on the meta device: any size, in seconds."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from upfit.architecture.fused import set_apart
from upfit.architecture.table import known_entry
from upfit.errors import UpfitError
from upfit.model_files import check_numbers, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
FILLS = ("kaiming_uniform_", "normal_", "uniform_", "constant_", "trunc_normal_", "fill_", "zero_")  # of torch, in place
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
def counted() -> Iterator[None]:
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


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """In the block tensors on the meta device are not initialised: they have no values, and every call would cost as much as
    one that draws them. Others are."""
    import torch
    from torch.overrides import TorchFunctionMode

    fills = {getattr(owner, name) for owner in (torch.nn.init, torch.Tensor) for name in FILLS if hasattr(owner, name)}

    class NothingDrawn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in fills:
                tensor = args[0] if args else kwargs["tensor"]
                if tensor.is_meta:
                    return tensor
            return func(*args, **(kwargs or {}))

    with NothingDrawn():
        yield


def build_on_meta(config: dict[str, Any], meta: bool = True, stored: bool = False) -> "PreTrainedModel":
    """The model that transformers builds for this `config.json`, on the meta device (or, without `meta`, where torch is set
    to). Fused queries, keys and values are set apart in it; with `stored` they are left as they are stored.

    Raises UpfitError when transformers has no such class or the class refuses the config.
    """
    import torch

    with quiet_transformers(), config_errors(config):
        parsed, model_class = read_as_class(config), model_class_for(config)
        with torch.device("meta") if meta else nullcontext(), counted(), nothing_drawn():
            model = model_class._from_config(parsed)
    entry = None if stored else known_entry(config)
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
    with config_errors(config), quiet_transformers():
        return CONFIG_MAPPING[model_type].from_dict(_with_floats(config))


@contextmanager
def config_errors(config: dict[str, Any]) -> Iterator[None]:
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
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
    config_class = CONFIG_MAPPING[config["model_type"]]
    mappings = [getattr(transformers, auto)._model_mapping for auto in AUTO_CLASSES if hasattr(transformers, auto)]
    known = [mapping[config_class] for mapping in mappings if config_class in mapping]
    known = [model_class[0] if isinstance(model_class, tuple) else model_class for model_class in known]
    for model_class in known:
        if model_class.__name__ in named:
            return model_class
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
        model_class = auto_class._model_mapping.get(CONFIG_MAPPING[config["model_type"]], None) if auto_class else None
        if model_class is not None and wanted in (model_class if isinstance(model_class, tuple) else (model_class,)):
            return auto_class
    return wanted


def vocabulary(config: dict[str, Any]) -> int | None:
    """Number of token ids the model knows, from its input embedding; None when it has none."""
    try:
        return int(build_on_meta(config).get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    except (AttributeError, NotImplementedError):
        return None
