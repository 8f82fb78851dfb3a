"""Tiny models that see, with processors of their families, and folders of images with texts. Nothing is downloaded.

Processors of families that see films too want torchvision; for those that cannot be made there are `raw_examples`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken

from tests.folders import letter_tokenizer
from tests.tiny import ORDINARY_TOKENS, VOCABULARY, model_of, tiny_config
from upfit.examples import Example

SIDE = 32  # pixels of an image, unless the processor takes any
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ IMAGE if part.type == 'image' else part.text }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LINES = [{"file_name": f"{number}.png", "text": f"this is number {number}" + number % 4 * " and more"} for number in range(12)]
SQUARE = {"height": SIDE, "width": SIDE}

# How the family's processor is made: its class, its image processor's and that one's settings, its own settings, names of
# tokens by their keys in the config, further settings of the config, and what its chat template puts where an image stands.
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
}
QWEN_TOKENS |= {"vision_end_token_id": "<|vision_end|>"}
QWEN_SIZES = {"min_pixels": 32 * 32, "max_pixels": 96 * 96, "patch_size": 16, "merge_size": 2}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
IDEFICS_SIZES = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>", "<row_1_col_2>")
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "processor": ("LlavaProcessor", "CLIPImageProcessor"),
        "images": {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        "settings": {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "tokens": {"image_token_index": "<image>"},
        "template": "<image>",
    },
    "paligemma": {
        "processor": ("PaliGemmaProcessor", "SiglipImageProcessor"),
        "images": {"size": SQUARE, "image_seq_length": 4},
        "config": {"projection_dim": 32, "vision_config.projection_dim": 32},
        "tokens": {"image_token_index": "<image>"},
    },
    "gemma3": {
        "processor": ("Gemma3Processor", "Gemma3ImageProcessor"),
        "images": {"size": SQUARE},
        "settings": {"image_seq_length": 4},
        "config": {"mm_tokens_per_image": 4},
        "tokens": {"boi_token_index": "<boi>", "eoi_token_index": "<eoi>", "image_token_index": "<soft>"},
        "named": {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"},
        "template": "<boi>",
    },
    "idefics3": {
        "processor": ("Idefics3Processor", "Idefics3ImageProcessor"),
        "images": IDEFICS_SIZES,
        "settings": {"image_seq_len": 1},
        "tokens": {"image_token_id": "<image>"},
        "others": IDEFICS_TOKENS,
        "template": "<image>",
    },
    "mllama": {
        "processor": ("MllamaProcessor", "MllamaImageProcessor"),
        "images": {"size": SQUARE, "max_image_tiles": 4},
        "tokens": {"image_token_index": "<|image|>"},
        "template": "<|image|>",
    },
    "qwen2_vl": {
        "processor": ("Qwen2VLProcessor", "Qwen2VLImageProcessor"),
        "video": "Qwen2VLVideoProcessor",
        "images": QWEN_SIZES,
        "tokens": QWEN_TOKENS,
        "template": QWEN_IMAGE,
    },
    "qwen3_vl": {
        "processor": ("Qwen3VLProcessor", "Qwen2VLImageProcessor"),
        "video": "Qwen3VLVideoProcessor",
        "images": QWEN_SIZES,
        "config": {"vision_config.deepstack_visual_indexes": [0]},
        "tokens": QWEN_TOKENS,
        "template": QWEN_IMAGE,
    },
    "qwen3_5": {
        "processor": ("Qwen3VLProcessor", "Qwen2VLImageProcessor"),
        "video": "Qwen3VLVideoProcessor",
        "images": QWEN_SIZES,
        "tokens": QWEN_TOKENS,
        "template": QWEN_IMAGE,
    },
}


def save_seeing(folder: Path, model_type: str, template: bool = True, processor: bool = True, **changes: Any) -> Path:
    """A folder with a model, its tokenizer and, with `processor`, that of its family, which has a chat template if there is one
    for it and `template`."""
    family = FAMILIES[model_type]
    config = tiny_config(model_type, max_position_embeddings=512, **changes)
    for name, value in family.get("config", {}).items():
        owner, _, key = name.rpartition(".")
        setattr(getattr(config, owner) if owner else config, key, value)
    model_of(config).save_pretrained(folder)
    tokens = dict(enumerate(family.get("others", ()), 100)) | {
        getattr(config, key): name for key, name in family["tokens"].items()
    }
    tokenizer = _tokenizer(tokens, family.get("named", {}))
    if processor:
        _processor(family, tokenizer, template).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
    return folder


def _processor(family: dict[str, Any], tokenizer: Any, template: bool) -> Any:
    of_whole, of_images = (getattr(transformers, name) for name in family["processor"])
    settings = dict(family.get("settings", {}))
    if "video" in family:
        settings["video_processor"] = getattr(transformers, family["video"])()
    if template and "template" in family:
        settings["chat_template"] = TEMPLATE.replace("IMAGE", repr(family["template"]))
    return of_whole(image_processor=of_images(**family["images"]), tokenizer=tokenizer, **settings)


def _tokenizer(tokens: dict[int, str], named: dict[str, str]) -> Any:
    """Letters, and special tokens by their ids; ids in between have names too."""
    tokenizer = letter_tokenizer()
    names = [tokens.get(number, f"<unused{number}>") for number in range(len(tokenizer), VOCABULARY)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.add_special_tokens({"bos_token": "<end>"})
    for name, token in named.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    assert all(tokenizer.convert_tokens_to_ids(name) == number for number, name in tokens.items())
    return tokenizer


def image_folder(folder: Path, lines: list[dict[str, Any]] | None = None, sides: tuple[int, int] = (40, 72)) -> Path:
    """Images of several sizes between `sides`, each of other colours, and their texts."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for line in LINES:
        height, width = draw.integers(*sides, 2)
        shade = np.linspace(0, 1, height)[:, None, None] * draw.random(3) + np.linspace(0, 1, width)[:, None] * draw.random(3)
        pixels = 255 * np.clip(shade / 2 + 0.1 * draw.random((height, width, 3)), 0, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / line["file_name"])
    lines = LINES if lines is None else lines
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def raw_examples(model_type: str, count: int = 12) -> list[Example]:
    """Examples of a model that takes the patches of images of any size: what its processor would make, with random pixels."""
    config = tiny_config(model_type)
    draw = torch.Generator().manual_seed(0)
    examples = []
    for number in range(count):
        height, width = (2 * int(torch.randint(1, 4, (), generator=draw)) for _ in range(2))
        seen = [config.image_token_id] * (height * width // 4)
        text = torch.randint(*ORDINARY_TOKENS, (20,), generator=draw).tolist()
        ids = torch.tensor([*text[:3], config.vision_start_token_id, *seen, config.vision_end_token_id, *text[3:]])
        patches = torch.rand(height * width, 3 * 2 * 16 * 16, generator=draw)
        grid = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, width]])}
        marks = (ids == config.image_token_id).long()[None]
        examples.append(Example({**grid, "mm_token_type_ids": marks}, ids, ids.roll(-1), "", str(number)))
    return examples
