"""What every model type of ours is: a stock class of transformers whose attention modules have a class of ours put in front.

`config.json` names the stock family (`base_model_type`). Reading it gives a config of that family, and building it the family's
own model; then `swap` changes its attention modules. A changed module calls transformers' attention interface as before, and
the call comes to the interface function of its model type, which may call the stock implementation with what it likes.

This file ships inside converted folders, so it imports torch and transformers only.
"""

import sys
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What forwards call the cache that they are given and give back: since transformers 5.24; before; and those of state spaces.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_among(arguments: tuple[Any, ...], keywords: Any) -> Any:
    """The cache among what a forward is given or gives back, by a known name or, whatever its name, by its class; or None."""
    named = [keywords[name] for name in keywords if name in CACHE_NAMES]
    others = [value for value in (*arguments, *keywords.values()) if isinstance(value, Cache)]
    return next((value for value in (*named, *others) if value is not None), None)


class View:
    """A stock attention's config, which sends its call to our interface; everything else is the real config's."""

    def __init__(self, real: Any, interface: str) -> None:
        self.real = real
        self._attn_implementation = interface

    def __getattr__(self, name: str) -> Any:
        if name == "real":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.real, name)


class Plain:
    """An attention module as the stock implementations expect it, with its real config."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            return self.module.config.real
        value = getattr(self.module, name)
        return self.module.sinks_of(value) if name == "sinks" else value


class Own:
    """What goes in front of a stock attention class.

    Training loops may ask: `upfit_added` names the parameters that a conversion added (`upfit_rates` their learning rates in
    units of the others', where they want more), `upfit_paired` the modules whose rows come in pairs that began as equals,
    `upfit_measures` tells numbers worth watching, `progress` is to be set from 0 to 1. Others may ask: `upfit_cached` names
    weights whose outputs are kept in the cache beside keys and values, `upfit_ablations` has parts of the module, and the
    parameters that are to be zero for it to do without them.
    """

    stock_module: str
    upfit_added: tuple[str, ...] = ()
    upfit_rates: ClassVar[dict[str, float]] = {}
    upfit_ablations: ClassVar[dict[str, tuple[str, ...]]] = {}
    upfit_cached: tuple[str, ...] = ()
    upfit_paired: tuple[str, ...] = ()
    progress: float = 1.0

    def sinks_of(self, sinks: Any) -> Any:
        """Attention sinks, one for each query head that the stock attention is given."""
        return sinks

    def upfit_measures(self) -> dict[str, float]:
        return {}


def stock_attention(module: Any) -> Callable[..., Any]:
    """The attention function that the user chose for the model (eager, sdpa, ...)."""
    eager = sys.modules[module.stock_module].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config.real._attn_implementation, eager)


_in_front: dict[tuple[type, type], type] = {}


def in_front_of(chosen: type, stock: type) -> type:
    """The one class of `chosen` in front of `stock`: torch.compile compiles anew for every class that it meets."""
    if (chosen, stock) not in _in_front:
        _in_front[chosen, stock] = type(stock.__name__, (chosen, stock), {"stock_module": stock.__module__})
    return _in_front[chosen, stock]


def put_in_front(attention: Any, chosen: type[Own], interface: str | None) -> None:
    """Change a stock attention module, in place, into one of `chosen` that calls our interface, if it calls any."""
    attention.__class__ = in_front_of(chosen, type(attention))
    if interface is not None:
        attention.config = View(attention.config, interface)


class _Told:
    """A stock config that writes itself as ours."""

    own_type: str

    def to_dict(self) -> dict[str, Any]:
        record = super().to_dict()  # type: ignore[misc]
        return record | {"model_type": self.own_type, "base_model_type": self.base_model_type}  # type: ignore[attr-defined]


_configs: dict[tuple[type, type], type] = {}
_models: dict[tuple[type, type], type] = {}


class OwnConfig(PreTrainedConfig):
    """Reads `config.json`; what it returns is a config of the stock family. `models`: auto class → our class for it."""

    models: ClassVar[dict[Any, Any]]

    @classmethod
    def bound(cls, base_model_type: str) -> Any:
        """The config class of that family whose model is ours; made once."""
        stock = CONFIG_MAPPING[base_model_type]
        key = (cls, stock)
        if key not in _configs:
            body = {"__module__": cls.__module__, "_auto_class": "AutoConfig", "stock": stock, "own_type": cls.model_type}
            body["base_model_type"] = base_model_type  # transformers before 5.20 writes a config without arguments to compare
            _configs[key] = bound = type(cls.__name__, (_Told, stock), body)
            for auto, model in cls.models.items():
                if stock in auto._model_mapping:
                    auto.register(bound, model, exist_ok=True)
        return _configs[key]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        settings = {key: value for key, value in config_dict.items() if key != "model_type"}
        return cls.bound(config_dict["base_model_type"]).from_dict(settings, **kwargs)


class OwnModel(PreTrainedModel):
    """Makes the model of the stock family that a config names, changed by `swap(model, config)`."""

    _supports_attention_backend = True
    config_class: Any = None
    auto: Any = None
    swap: Any = None

    @classmethod
    def model_for(cls, config: Any) -> Any:
        """The stock class of this config with our attention; made once."""
        stock = cls.auto._model_mapping[config.stock]
        stock = stock[0] if isinstance(stock, tuple) else stock
        key = (cls, stock)
        if key not in _models:
            # Without annotations: vLLM asks isinstance() of them.
            def __init__(self, config, *args, **kwargs):
                stock.__init__(self, config, *args, **kwargs)
                cls.swap(self, config)

            body = {
                "__module__": cls.__module__,
                "__init__": __init__,
                "config_class": type(config),
                "_auto_class": cls.auto.__name__,
                # The family's own names in files and its own initialisation hold here; for custom code both are left out.
                "is_custom_code": classmethod(lambda _: False),
            }
            _models[key] = type(cls.__name__, (stock,), body)
        return _models[key]

    def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.model_for(config)(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(path if config is None else config)
        return cls.model_for(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls.model_for(config)._from_config(config, **kwargs)
