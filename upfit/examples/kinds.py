"""What kind of input a model's class takes, from its config.json."""

import inspect
from typing import Any, Literal

from upfit.architecture.meta_model import model_class_for, read_as_class
from upfit.model_files import quiet_transformers

Kind = Literal["text", "pairs", "sound"]
SOUND = ("input_features", "input_values")  # what classes that hear call their main input
PIXELS = "pixel_values"  # what classes that see call their images
ENCODER_DECODERS = ("AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM")


def kind_of(config: dict[str, Any]) -> Kind:
    """ "text" for a decoder, which runs on text alone whatever else it can see or hear; "pairs" for an encoder-decoder of text;
    "sound" for one whose encoder hears."""
    config = of_family(config)
    if not read_as_class(config).is_encoder_decoder:
        return "text"
    with quiet_transformers():
        return "sound" if any(model_class.main_input_name in SOUND for model_class in _classes(config)) else "pairs"


def encoder_reads(config: dict[str, Any]) -> str | None:
    """ "text" or "sound"; None for a model without an encoder."""
    return {"pairs": "text", "sound": "sound"}.get(kind_of(config))


def sees(config: dict[str, Any]) -> bool:
    """Whether this is a decoder that images can be shown to."""
    config = of_family(config)
    taken = inspect.signature(model_class_for(config).forward).parameters
    return PIXELS in taken and not read_as_class(config).is_encoder_decoder


def _classes(config: dict[str, Any]) -> list[Any]:
    """The encoder-decoders that transformers has for this type; a decoder alone may be named for it too."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[config["model_type"]]
    mappings = [getattr(transformers, name)._model_mapping for name in ENCODER_DECODERS]
    known = [mapping[config_class] for mapping in mappings if config_class in mapping]
    return [model_class[0] if isinstance(model_class, tuple) else model_class for model_class in known]


def of_family(config: dict[str, Any]) -> dict[str, Any]:
    """The config as one of the stock family where its model type is one of ours, which names that family."""
    family = config.get("base_model_type")
    if not isinstance(family, str):
        return config
    return {**config, "model_type": family, "architectures": None}
