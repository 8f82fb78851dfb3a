"""Tiny models with random weights, built in memory, one for every model type whose attention can be regrouped.

A model type is a row of data in `tiny_data.py`; nothing here knows one by name. Nothing is downloaded.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.tiny_data import (
    DOES_NOT_RUN,
    INPUTS,
    KV_HEADS,
    LAYER_LISTS,
    MODEL_TYPES,
    OVERRIDES,
    SIZES,
    SOFTMAX_KINDS,
    TEXT_LEVELS,
    UNBUILDABLE,
    UNGROUPABLE,
)

__all__ = [
    "BUILDABLE",
    "UNBUILDABLE",
    "UNGROUPABLE",
    "auto_class",
    "kv_heads_paths",
    "model_of",
    "runs",
    "tiny_config",
    "tiny_inputs",
    "tiny_model",
]

# An older transformers lacks the newest model types; they are left out there.
BUILDABLE: tuple[str, ...] = tuple(t for t in MODEL_TYPES if t not in UNBUILDABLE and t in CONFIG_MAPPING)

# Added to every parameter: a norm left at one or a bias left at zero would hide that a conversion forgot it.
NOISE = 0.1

VOCABULARY = SIZES["vocab_size"]
ORDINARY_TOKENS = (3, 90)  # below are pad, bos and eos; above are the markers of images and audio

_AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}


def auto_class(model_type: str) -> Any:
    """The auto class that loads a checkpoint of this type without changing its type.

    AutoModelForCausalLM maps some multimodal types to a class for their text part only, which would be saved as another
    type: the first class that takes the whole configuration is better. Of encoder-decoders it has the decoder alone.
    """
    config_class = CONFIG_MAPPING[model_type]
    mappings = {name: getattr(modeling_auto, mapping) for name, mapping in _AUTO_CLASSES.items()}
    known = [name for name, mapping in mappings.items() if config_class in mapping]
    known.sort(key=lambda name: name == "AutoModelForCausalLM" and config_class().is_encoder_decoder)
    whole = [name for name in known if mappings[name][config_class].config_class is config_class]
    return getattr(transformers, (whole or known)[0])


def kv_heads_paths(model_type: str) -> tuple[str, ...]:
    """Dotted paths in the configuration of every key that counts key/value heads."""
    levels = _text_levels(model_type)
    return KV_HEADS.get(model_type) or tuple(f"{level}.num_key_value_heads".lstrip(".") for level in levels)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of a tiny model; `changes` replace keys at the text level, before the class derives others."""
    overrides = OVERRIDES.get(model_type, {})
    for level in _text_levels(model_type):
        overrides = _merged(overrides, level.split(".") if level else [], changes)
    return _shrunk(CONFIG_MAPPING[model_type], overrides)


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model in float32 and evaluation mode; the same seed gives the same weights."""
    return model_of(tiny_config(model_type, **changes), seed)


def model_of(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """As `tiny_model`, of this configuration."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class(config.model_type).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
    return model.eval()


def runs(model_type: str) -> bool:
    """Whether this type's own forward runs in the installed transformers."""
    version, _ = DOES_NOT_RUN.get(model_type, ("", ""))
    return not version or not transformers.__version__.startswith(f"{version}.")


def tiny_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The least that `forward` needs to give logits."""
    generator = torch.Generator().manual_seed(0)
    shapes = INPUTS.get(model.config.model_type, {"input_ids": (2, 12)})
    return {
        name: torch.randint(*ORDINARY_TOKENS, shape, generator=generator)
        if name.endswith("_ids")
        else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def _text_levels(model_type: str) -> tuple[str, ...]:
    nested = hasattr(CONFIG_MAPPING[model_type](), "text_config") if model_type not in TEXT_LEVELS else False
    return TEXT_LEVELS.get(model_type, ("text_config",) if nested else ("",))


def _merged(tree: Mapping[str, Any], path: list[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested mapping with the changes applied at the path."""
    if not path:
        return {**tree, **changes}
    return {**tree, path[0]: _merged(tree.get(path[0], {}), path[1:], changes)}


def _shrunk(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A small configuration of this class and of those inside it."""
    config = config_class()
    default = config.to_dict()
    inner = {key: type(value) for key, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    # A part that the class leaves out unless asked for is named by its model type.
    inner |= {k: CONFIG_MAPPING[v["model_type"]] for k, v in overrides.items() if isinstance(v, dict) and "model_type" in v}
    tiny = {key: value for key, value in SIZES.items() if key in default} | _token_ids(default)
    if "num_hidden_layers" in default:
        tiny |= _layers(default)
    tiny |= {key: value for key, value in overrides.items() if key != "model_type"}
    return config_class(**tiny | {key: _shrunk(part, overrides.get(key, {})) for key, part in inner.items()})


def _layers(default: Mapping[str, Any]) -> dict[str, Any]:
    """Each kind of layer of the default once, and a second softmax layer where other kinds leave only one."""
    found = {key: list(dict.fromkeys(default[key])) for key in LAYER_LISTS if default.get(key)}
    for kinds in found.values():
        softmax = [kind for kind in kinds if kind in SOFTMAX_KINDS]
        kinds += softmax if len(softmax) == 1 else []
    length = max([2, *map(len, found.values())])
    return {key: (kinds + kinds[-1:] * length)[:length] for key, kinds in found.items()} | {"num_hidden_layers": length}


def _token_ids(default: Mapping[str, Any]) -> dict[str, int]:
    """Pad, bos and eos at the bottom of the vocabulary, the other special tokens at its top."""
    low = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
    high = sorted(key for key in default if key.endswith(("_token_id", "_token_index")) and key not in low)
    inside = default.get("decoder_config")  # what the decoder's own config has is deprecated outside it
    low = {k: v for k, v in low.items() if not (isinstance(inside, Mapping) and k in inside)}
    return {k: v for k, v in low.items() if k in default} | {k: VOCABULARY - 1 - i for i, k in enumerate(high)}
