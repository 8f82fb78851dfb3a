"""Numbers in config.json that would never be done with are refused at once, whatever they are called and however deep."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from tests.folders import save_tiny
from tests.tiny import tiny_config, tiny_model
from upfit.architecture.loading import check_structure, load_strictly
from upfit.architecture.meta_model import build_on_meta
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.describe import describe
from upfit.errors import UpfitError
from upfit.evaluate.load import load_config
from upfit.model_files import check_numbers
from upfit.text.tokenizer import load_tokenizer

SECONDS = 20  # on a busy machine; without bounds it takes hours, or the memory
BOMBS = [
    ("llama", "num_hidden_layers"),
    ("llama", "num_labels"),
    ("llama", "hidden_size"),
    ("gpt2", "n_layer"),
    ("t5", "num_layers"),
    ("t5", "num_decoder_layers"),
    ("bart", "encoder_layers"),
    ("bart", "decoder_layers"),
    ("qwen2_5_vl", "vision_config.depth"),
    ("qwen2_5_vl", "text_config.num_hidden_layers"),
    ("mixtral", "num_local_experts"),
    ("diffllama", "head_dim"),
]


def changed(config: dict[str, Any], place: str, value: int) -> dict[str, Any]:
    *parents, key = place.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    return config


@pytest.mark.parametrize(("model_type", "place"), BOMBS, ids=lambda one: str(one))
@pytest.mark.parametrize("value", [10**9, 10**40, 3 * 10**6, 2**20 + 1])
def test_a_config_bomb_is_refused_at_once(tmp_path: Path, model_type: str, place: str, value: int) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), place, value)))
    began = time.monotonic()
    with pytest.raises(UpfitError) as caught:
        describe(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(("place", "value"), [("num_layers", 60_000), ("vision_config.depth", 10**5)])
def test_numbers_below_are_found_out_while_they_are_followed(tmp_path: Path, place: str, value: int) -> None:
    model_type = "qwen2_5_vl" if "." in place else "t5"
    tiny_model(model_type).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), place, value)))
    began = time.monotonic()
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(UpfitError, match="more than the .* layers and weights"):
        check_structure(checkpoint)
    with pytest.raises(UpfitError, match="more than the .* layers and weights"):
        load_strictly(tmp_path)
    assert time.monotonic() - began < 2 * SECONDS


def test_every_door_is_guarded(tmp_path: Path) -> None:
    """Libraries read config.json for the tokenizer and for the model: both come after the look at it."""
    from upfit.checkpoint.source import find_source

    folder = save_tiny(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_labels": 10**9}))
    for door in (find_source, load_tokenizer, lambda name: load_config(find_source(name))):
        with pytest.raises(UpfitError, match="num_labels = 1000000000"):
            door(str(folder))


def test_large_numbers_of_honest_configs_are_none() -> None:
    """Positions, bases and ids may be as large as they like, and so may whatever no class looks at."""
    config = json.loads(tiny_config("llama").to_json_string(use_diff=False))
    config |= {"max_position_embeddings": 10**7, "rope_theta": 10**9, "eos_token_id": 2 * 10**6, "num_parameters": 7 * 10**9}
    config |= {"sliding_window": 2**40, "training_tokens": [10**12]}
    check_numbers(config, 10_000)
    build_on_meta(config | {"rope_theta": 10_000})


@pytest.mark.slow
def test_every_class_as_it_is_made_is_honest() -> None:
    """Sizes of tensors, and of nothing else: no default of a class is refused, however small the folder."""
    for model_type, config_class in CONFIG_MAPPING.items():
        try:
            config = config_class().to_dict()
        except Exception:  # a class that cannot be made without being told more
            continue
        check_numbers(config, 10_000, Path(model_type))


def test_the_size_of_a_piece_of_sound_may_be_large_and_that_of_a_mask_not() -> None:
    samples = ("acoustic_tokenizer_chunk_size", "audio_chunk_size", "speech_encoder_chunk_size")
    check_numbers(dict.fromkeys(samples, 10**9), 10_000)
    for name in ("conf_attention_chunk_size", "audio_hidden_size", "speech_vocab_size"):
        with pytest.raises(UpfitError, match=f"{name} = 1048577, more than"):
            check_numbers({name: 2**20 + 1}, 10_000)
