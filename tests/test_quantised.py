"""Quantised is what is stored quantised, whatever the config says; integers of honest models are none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import save_tiny
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.output import Output

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"
WEIGHT = "model.layers.0.mlp.down_proj.weight"
MODULE = WEIGHT.removesuffix(".weight")


def run(source: Path, out: Path, **settings: Any) -> None:
    recipe = get_recipe("gqa")
    options = recipe.options(kv_heads=2, method="first")
    convert(recipe, str(source), out, options, Settings(verify=False, **settings), Output(quiet=True))


def edit(folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def beside(suffix: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{MODULE}.{suffix}": torch.ones(shape, dtype=dtype)})


def cast(dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)})


def instead(*suffixes: str, dtype: torch.dtype = torch.int32) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors.pop(WEIGHT)
        tensors.update({f"{MODULE}.{suffix}": torch.ones(4, 8, dtype=dtype) for suffix in suffixes})

    return change


def bitsandbytes(tensors: Tensors) -> None:
    tensors[WEIGHT] = torch.zeros(tensors[WEIGHT].numel() // 2, 1, dtype=torch.uint8)
    tensors |= {
        f"{WEIGHT}.absmax": torch.ones(24),
        f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    }


def in_another_layer(tensors: Tensors) -> None:
    """One prediction layer, and that in FP8."""
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors[WEIGHT].to(torch.float8_e4m3fn)


STORED = {
    "fp8": cast(torch.float8_e4m3fn),
    "fp8-wide": cast(torch.float8_e5m2),
    "int8": cast(torch.int8),
    "scale": beside("weight_scale", 32, 1),
    "inverse-scale": beside("weight_scale_inv", 1, 1),
    "input-scale": beside("input_scale"),
    "zero-points": beside("weight_zero_point", 32, dtype=torch.int8),
    "gptq": instead("qweight", "qzeros"),
    "awq-scales": beside("scales", 4, 32, dtype=torch.float16),
    "compressed-tensors": instead("weight_packed"),
    "unknown-packing": instead("codes", dtype=torch.int16),
    "bitsandbytes": bitsandbytes,
    "int8-of-bitsandbytes": beside("SCB", 32),
    "a-layer-more": in_another_layer,
}


@pytest.mark.parametrize("kind", STORED)
def test_quantised_weights_are_refused(tmp_path: Path, kind: str) -> None:
    source = edit(save_tiny(tmp_path / "source", tokenizer=False), STORED[kind])
    for settings in ({}, {"dtype": "bfloat16"}, {"dry_run": True}):
        with pytest.raises(UpfitError, match="is quantised .*convert the checkpoint it was made from") as caught:
            run(source, tmp_path / "out", **settings)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_files_that_tell_of_it_are_believed(tmp_path: Path, name: str) -> None:
    source = save_tiny(tmp_path / "source", tokenizer=False)
    (source / name).write_text('{"producer": {"name": "x"}, "quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UpfitError, match=rf"quantised \(FP8, by its {name}\)"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"format": "int-quantized"}}, "unknown"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4"),
    ],
)
def test_configs_that_tell_of_it_are_believed(tmp_path: Path, config: dict[str, Any], method: str) -> None:
    path = save_tiny(tmp_path / "source", tokenizer=False) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UpfitError, match=rf"quantised \({method}\)"):
        run(tmp_path / "source", tmp_path / "out")


def test_types_of_half_a_byte_are_told_as_what_they_are(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "source", tokenizer=False) / FILE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[WEIGHT]["dtype"] = "F4"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UpfitError, match="is quantised .*stored as F4"):
        run(tmp_path / "source", tmp_path / "out")


HONEST = {
    "position-ids": ("model.embed_tokens.position_ids", torch.arange(8)),
    "mask": ("model.layers.0.self_attn.bias", torch.ones(1, 1, 5, 5, dtype=torch.uint8)),
    "boolean-mask": ("model.layers.0.self_attn.masked", torch.ones(5, dtype=torch.bool)),
    "scale-of-cached-keys": ("model.layers.0.self_attn.k_scale", torch.ones(1)),
    "layer-scale": ("model.layers.0.ls.scale", torch.ones(7)),
}


@pytest.mark.parametrize("kind", HONEST)
def test_integers_and_scales_of_plain_models_are_none(tmp_path: Path, kind: str) -> None:
    name, tensor = HONEST[kind]
    source = edit(save_tiny(tmp_path / "source", tokenizer=False), lambda tensors: tensors.update({name: tensor}))
    run(source, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / FILE)[name], tensor)


def test_integers_that_the_class_has_are_none(tmp_path: Path) -> None:
    """BatchNorm counts batches in I64."""
    from tests.tiny import tiny_model
    from upfit.architecture.quantised import check_not_quantised
    from upfit.checkpoint.reader import open_checkpoint

    tiny_model("granite_speech").save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert "I64" in {info.dtype for info in checkpoint.tensors.values()}
        check_not_quantised(checkpoint)
